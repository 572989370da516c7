"""A recorded trace through the caches, ours and stock's, without a model.

The engine's own pools and allocator, with rows of a few bytes in place of a model's, and the calls
that its scheduler makes, one request after another: hits, copied bytes and CPU time are those of
the cache with a model on a device with so many tokens. Every cell runs in a process of its
own. Beside it are the hit rates of LRU and of MIN, which knows the requests to come, in a cache of
as many bytes without a copy that is there twice and without windows on the host.

    python -m launch.bench.trace --trace conversation.jsonl --system ours stock stock-no-host \\
        --host-gb 50 200 --requests 4000 --out out/trace.json
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.bench.machine import facts
from launch.server import CPU, inherited
from sglang_ext.arguments import Parser, input_file, number, output_file, whole
from sglang_ext.config import RETENTION
from sglang_ext.planning.model import COMPRESSED, PRESETS, Shape
from sglang_ext.sizing import traces
from sglang_ext.sizing.bounds import Bounds
from sglang_ext.sizing.traffic import Tokens

KEYS_AND_VALUES, PAGES_OF_BYTES = "gpt-oss-120b", "deepseek-v4-flash"
MODELS: dict[str, Shape] = {
    KEYS_AND_VALUES: PRESETS[KEYS_AND_VALUES],
    PAGES_OF_BYTES: COMPRESSED[PAGES_OF_BYTES],
}
"""Those of ``trace_models``, which needs the engine."""
OURS_LRU = "ours-lru"
SYSTEMS = ("ours", OURS_LRU, "stock", "stock-no-host")
"""The second one without learned retention."""
_GB = 1e9
_MOST_GB = 1e4


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cache.

    Attributes:
        host_gb: of the model's KV; 0 for no host tier.
    """

    system: str
    host_gb: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--trace",
        type=input_file,
        required=True,
        help="JSON lines: hash ids as in Mooncake's and Qwen's traces, or token ids",
    )
    parser.add_argument(
        "--block-size",
        type=whole(1),
        default=traces.MOONCAKE_BLOCK,
        help=f"tokens behind a hash id: {traces.MOONCAKE_BLOCK} in Mooncake's traces, "
        f"{traces.QWEN_BLOCK} in Qwen's",
    )
    parser.add_argument("--model", choices=sorted(MODELS), default=KEYS_AND_VALUES)
    parser.add_argument("--requests", type=whole(1), help="the first ones only; default: all")
    parser.add_argument(
        "--system", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="none: bounds only"
    )
    parser.add_argument(
        "--host-gb", type=number(0, _MOST_GB), nargs="+", default=[50.0, 200.0], help="10^9 bytes"
    )
    parser.add_argument(
        "--device-tokens",
        type=whole(1),
        default=1_000_000,
        help="with full-attention KV; with sliding-window KV half as many, of DeepSeek-V4 a tenth",
    )
    parser.add_argument(
        "--page", type=whole(1), default=64, help="tokens; DeepSeek-V4 has one size alone"
    )
    parser.add_argument("--chunk", type=whole(1), default=8192, help="--chunked-prefill-size")
    parser.add_argument(
        "--core", choices=("rust", "python"), default="rust", help="of stock's cache"
    )
    parser.add_argument(
        "--warm",
        type=whole(0),
        default=0,
        help="so many of the requests fill the caches first: they count in nothing but what is "
        "recomputed at most",
    )
    parser.add_argument(
        "--verify", action="store_true", help="KV names its tokens, which are compared"
    )
    parser.add_argument("--out", type=output_file, default=Path("out/trace.json"))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        args.summary = traces.check(args.trace, args.block_size)
    except traces.TraceError as error:
        parser.error(str(error))
    if args.verify and args.model == PAGES_OF_BYTES:
        parser.error(
            f"--verify is not supported with --model {args.model}: stock's copies of its "
            f"pages do not run on a CPU; allowed: --model {KEYS_AND_VALUES}"
        )
    args.page = MODELS[args.model].geometry(args.page).device_page
    served = min(args.requests or args.summary.requests, args.summary.requests)
    if args.warm >= served:
        parser.error(f"--warm {args.warm}: allowed is less than the {served} requests")
    return args


def requests(args: argparse.Namespace) -> Iterator[tuple[Tokens, Tokens]]:
    """Those that are replayed."""
    return itertools.islice(traces.read(args.trace, args.block_size), args.requests)


def cells(args: argparse.Namespace) -> list[Cell]:
    """Without a host tier stock is one system."""
    every = []
    for system, host_gb in itertools.product(args.system, sorted(args.host_gb)):
        if system.startswith("ours") or (system == "stock" and host_gb):
            every.append(Cell(system, host_gb))
        else:
            every.append(Cell("stock-no-host", 0.0))
    return list(dict.fromkeys(every))


def bounds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each host size: tokens that device and host have room for, and what is found there."""
    unit = args.block_size if args.summary.hashed else args.page
    of = Bounds(requests(args), unit, args.page)
    rows = []
    for host_gb in sorted({0.0, *args.host_gb}):
        room = args.device_tokens + int(host_gb * _GB / MODELS[args.model].full_token_bytes)
        row = {"host_gb": host_gb, "tokens": room, "lru": of.lru(room), "min": of.best(room)}
        rows.append(row)
    return rows


# ---- one cell, in a child process -------------------------------------------------


def measure(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Replay the requests against one cache of this process."""
    import torch
    from sglang.srt.plugins import load_plugins

    torch.set_num_threads(1)
    load_plugins()
    from launch.bench.trace_caches import Cache, Sizes
    from launch.bench.trace_models import MODELS as STAND_INS
    from launch.bench.trace_requests import Scheduler, WrittenIds

    longest = max(len(prompt) + len(answer) for prompt, answer in requests(args))
    host_bytes = int(cell.host_gb * _GB)
    model = STAND_INS[args.model]
    sizes = Sizes(model, args.device_tokens, host_bytes, args.page, args.chunk, longest)
    cache = Cache("ours" if cell.system.startswith("ours") else "stock", sizes)
    scheduler = Scheduler(cache, WrittenIds(cache) if args.verify else None)
    total = min(args.requests or args.summary.requests, args.summary.requests)
    name = f"{cell.system}, {cell.host_gb:g} GB"
    served = tqdm(requests(args), name, total, mininterval=5.0, unit="req")
    for count, (prompt, answer) in enumerate(served):
        if count == args.warm:
            # a server does that when it has warmed up: what was imported is not looked at again
            gc.collect()
            gc.freeze()
            scheduler.count_from_here()
        scheduler.serve(prompt, answer)
    cache.check_idle()
    counted, copies, times = scheduler.counted, cache.copies, cache.times
    token_bytes = {"full": model.shape.full_token_bytes, "window": model.shape.swa_token_bytes}

    def model_bytes(tokens: dict[str, int]) -> dict[str, int]:
        return {kind: int(count * token_bytes[kind]) for kind, count in tokens.items()}

    def rate(tokens: int) -> float:
        return tokens / max(1, counted.prompt)

    return {
        **dataclasses.asdict(cell),
        "hit_rate": rate(counted.from_device + counted.from_host),
        "device_hit_rate": rate(counted.from_device),
        "host_hit_rate": rate(counted.from_host),
        "to_host_bytes": model_bytes(copies.to_host),
        "to_device_bytes": model_bytes(copies.to_device),
        "most_recompute_tokens": cache.most_again,
        "host_pages": cache.host_pages(),
        "cache_ms_per_request": times.seconds * 1e3 / counted.requests,
        "scheduler_ms_per_request": counted.seconds * 1e3 / counted.requests,
        "copies_ms_per_request": times.copies * 1e3 / counted.requests,
        "calls": times.as_dict(counted.requests),
        "counted": dataclasses.asdict(counted),
    }


# ---- the report ---------------------------------------------------------------


def run(argv: Sequence[str], args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Measure a cell in a process of its own.

    Args:
        argv: the command line, which the child gets too.
    """
    command = [sys.executable, "-W", "ignore", "-m", "launch.bench.trace", *argv]
    child = subprocess.run(
        [*command, "--cell", cell.system, str(cell.host_gb)],
        env={
            **inherited(),
            **CPU,
            "OMP_NUM_THREADS": "1",
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": args.core,
            RETENTION: "lru" if cell.system == OURS_LRU else "learned",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return measured


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The cells for a reader."""
    lines = [
        "system         host GB   hits  device   host  ms/request  with engine  largest call, ms"
        "                 to host GB  to device GB  recompute"
    ]
    for row in rows:
        name, call = max(row["calls"].items(), key=lambda item: item[1]["largest_ms"])
        to_host, to_device = (
            sum(row[key].values()) / _GB for key in ("to_host_bytes", "to_device_bytes")
        )
        lines.append(
            f"{row['system']:<14} {row['host_gb']:>7g} {row['hit_rate']:>6.4f} "
            f"{row['device_hit_rate']:>7.4f} {row['host_hit_rate']:>6.4f} "
            f"{row['cache_ms_per_request']:>11.3f} {row['scheduler_ms_per_request']:>12.3f} "
            f"{call['largest_ms']:>8.1f} {name:<24} {to_host:>10.1f} {to_device:>13.1f} "
            f"{row['most_recompute_tokens']:>10}"
        )
    return "\n".join(lines)


def bounds_table(rows: Sequence[dict[str, Any]]) -> str:
    """The bounds for a reader."""
    lines = ["host GB      tokens     LRU     MIN"]
    for row in rows:
        figures = f"{row['lru']:>7.4f} {row['min']:>7.4f}"
        lines.append(f"{row['host_gb']:>7g} {row['tokens']:>11} {figures}")
    return "\n".join(lines)


def main() -> None:
    """Parent: bounds, and every cell; prints and writes. Child: measure one cell."""
    argv = sys.argv[1:]
    args = parse_args(argv)
    if args.cell:
        os.environ.update(CPU)
        print(json.dumps(measure(args, Cell(args.cell[0], float(args.cell[1])))))
        return
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("cell", "summary", "trace", "out")
    }
    report: dict[str, Any] = {
        **facts(),
        "model": args.model,
        "trace": args.trace.name,
        "settings": settings,
        "bounds": bounds(args),
        "cells": [],
    }
    print(bounds_table(report["bounds"]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(args):
        report["cells"].append(run(argv, args, cell))
        # after every cell: an interrupted run keeps what it has measured
        args.out.write_text(json.dumps(report, indent=1, default=str))
    args.out.write_text(json.dumps(report, indent=1, default=str))
    if report["cells"]:
        print(table(report["cells"]))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
