"""Stock's host tier and ours on the same requests and the same host bytes, side by side.

For each shape of traffic and each size of the host memory two servers run with the same model,
one after the other or beside each other, and get the same sessions one request at a time, so the
hits are the caches' own. Hits come from the engine's answers, bytes from its metrics.

    python -m launch.bench.hits --out docs/benchmarks/data/hits.json
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import platform
import queue
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch.bench.metrics import metric, settled
from launch.models.tiny import ready_made
from launch.server import CPU, OURS, Server, running
from launch.traffic import generate
from sglang_ext.arguments import Parser, core, number, output_file, whole
from sglang_ext.config import CHECKPOINT_TOKENS
from sglang_ext.sizing.traffic import (
    Agent,
    Chat,
    Shape,
    SharedPrefix,
    Tokens,
    Turn,
    interleave,
)

ROOT = Path(__file__).resolve().parents[2]
WINDOW, PAGE, DEVICE_TOKENS, VOCABULARY = 128, 64, 32768, 512
HOST_SIZES = (0.5, 1.0, 2.0)
"""Of the host memory, in sizes of the device pools."""
SHAPES: dict[str, tuple[Shape, int]] = {
    # (sessions, how many of them go on at the same time)
    "chat": (
        Chat(192, 6, system=100, first=(200, 1000), question=(20, 250), answer=(8, 24)),
        96,
    ),
    "agent": (
        Agent(120, 9, kinds=24, tools=600, task=(50, 250), call=(8, 24), result=(50, 400)),
        80,
    ),
    "shared-prefix": (
        SharedPrefix(
            1120, prompts=240, exponent=0.8, system=(300, 2000), question=(20, 150), answer=(8, 24)
        ),
        32,
    ),
}
SERVER = (
    *("--dtype", "float32", "--page-size", str(PAGE), "--max-total-tokens", str(DEVICE_TOKENS)),
    *("--mem-fraction-static", "0.3", "--chunked-prefill-size", "512", "--enable-metrics"),
    *("--max-running-requests", "4", "--hicache-io-backend", "direct", "--skip-server-warmup"),
    *("--enable-hierarchical-cache", "--hicache-write-policy", "write_through"),
)
CACHES = {"stock": (), "ours": OURS}
METRICS = {
    "written_bytes": "sglang:hicache_backup_bytes_total",
    "loaded_bytes": "sglang:load_back_bytes_total",
}
_LOOK_EVERY = 100
"""Requests. The largest recompute that a server tells of is that of the last minutes."""
INTERVAL = 2048
"""Tokens between the windows that ours keeps inside a prompt, see CHECKPOINT_TOKENS."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of one server.

    Attributes:
        host_size: in sizes of the device pools.
    """

    cache: str
    shape: str
    host_size: float

    @property
    def name(self) -> str:
        """For a reader, and for its log file."""
        return f"{self.shape}-{self.host_size:g}-{self.cache}"


def hold_sessions(server: Server, shape: Shape, active: int, seed: int) -> dict[str, int]:
    """Send all turns, one at a time, in a random order of the sessions.

    Returns:
        Requests, and tokens: of the prompts, of what was found in each tier, and the most that
        one request computed again for want of a window.
    """
    counted = {"requests": 0, "prompt": 0, "from_device": 0, "from_host": 0}
    largest = 0.0

    def look(text: str) -> None:
        nonlocal largest
        largest = max(largest, metric(text, "sglang_ext:recompute_max_tokens"))

    def answer(turn: Turn) -> Tokens:
        result = generate(server, turn.prompt.tolist(), turn.answer)
        tiers = result["meta_info"].get("cached_tokens_details") or {}
        counted["requests"] += 1
        counted["prompt"] += len(turn.prompt)
        counted["from_device"] += tiers.get("device", 0)
        counted["from_host"] += tiers.get("host", 0)
        if counted["requests"] % _LOOK_EVERY == 0:
            look(server.get("/metrics"))
        return np.array(result["output_ids"], dtype=np.int64)

    for _ in interleave(shape, active, VOCABULARY, seed, answer):
        pass
    look(settled(server))
    return {**counted, "largest_recompute_tokens": int(largest)}


def run(cell: Cell, model: Path, out: Path, seed: int, cpu: int | None) -> dict[str, Any]:
    """Start the cell's server, send its traffic, read its counters."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})  # of this thread; the server inherits it
    shape, active = SHAPES[cell.shape]
    arguments = ["--model-path", str(model), *SERVER, *CACHES[cell.cache]]
    arguments += ["--hicache-ratio", f"{cell.host_size:g}"]
    environment = {**CPU, "OMP_NUM_THREADS": "1"}
    if cell.cache == "ours":
        environment[CHECKPOINT_TOKENS] = str(INTERVAL)
    with running(arguments, out / f"{cell.name}.log", environment) as server:
        counted = hold_sessions(server, shape, active, seed)
        text = server.get("/metrics")
    copied = {key: metric(text, name) for key, name in METRICS.items()}
    hit_rate = (counted["from_device"] + counted["from_host"]) / counted["prompt"]
    return {**dataclasses.asdict(cell), "hit_rate": hit_rate, **counted, **copied}


def compare(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Ratios of ours to stock in one cell; None where stock has nothing to divide by."""

    def ratio(key: str, per: str | None = None) -> float | None:
        a, b = ((r[key] / r[per] if r[per] else 0.0) if per else r[key] for r in (ours, stock))
        return a / b if b else None

    return {
        "shape": ours["shape"],
        "host_size": ours["host_size"],
        "stock_hit_rate": stock["hit_rate"],
        "our_hit_rate": ours["hit_rate"],
        "hit_rate": ratio("hit_rate"),
        "written_per_host_hit": ratio("written_bytes", per="from_host"),
        "loaded_per_host_hit": ratio("loaded_bytes", per="from_host"),
        "largest_recompute_tokens": ours["largest_recompute_tokens"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The ratios for a reader."""
    lines = ["shape          host  hits: stock   ours  ratio  written/hit  loaded/hit  recompute"]
    for row in rows:
        figures = (row[k] for k in ("hit_rate", "written_per_host_hit", "loaded_per_host_hit"))
        hit, written, loaded = (" none" if f is None else f"{f:5.2f}" for f in figures)
        lines.append(
            f"{row['shape']:<14} {row['host_size']:>4g} {row['stock_hit_rate']:>12.3f} "
            f"{row['our_hit_rate']:>6.3f}  {hit}        {written}       {loaded} "
            f"{row['largest_recompute_tokens']:>10.0f}"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "hits.json")
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--host-sizes", nargs="+", type=number(above=0), default=list(HOST_SIZES))
    parser.add_argument(
        "--full-every",
        type=whole(2),
        default=4,
        help="every n-th layer has full attention: 4 as in Llama 4 and Step-3.5, 2 as in gpt-oss",
    )
    parser.add_argument(
        "--cores",
        nargs="*",
        type=core,
        default=[],
        help="as many servers at a time, each on one of these; default: one, on any",
    )
    return parser.parse_args(argv)


def main() -> None:
    """Run every cell, print the ratios, write everything."""
    args = parse_args()
    model, logs = ready_made(WINDOW, args.full_every), args.out.parent / "bench"
    cells = [
        Cell(cache, shape, size)
        for shape, size in itertools.product(args.shapes, args.host_sizes)
        for cache in CACHES
    ]
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for cpu in args.cores or [None]:
        cores.put(cpu)

    def run_on_a_core(cell: Cell) -> dict[str, Any]:
        cpu = cores.get()
        try:
            return run(cell, model, logs, args.seed, cpu)
        finally:
            cores.put(cpu)

    with concurrent.futures.ThreadPoolExecutor(max(1, len(args.cores))) as pool:
        results = list(tqdm(pool.map(run_on_a_core, cells), total=len(cells), unit="server"))
    pairs = zip(results[::2], results[1::2], strict=True)
    rows = [compare(stock, ours) for stock, ours in pairs]
    print(table(rows))
    report = {
        "versions": {name: version(name) for name in ("sglang", "sglang-ext", "torch", "numpy")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "model": {
            "window": WINDOW,
            "full_every": args.full_every,
            "page": PAGE,
            "device_tokens": DEVICE_TOKENS,
        },
        "checkpoint_tokens": INTERVAL,
        "shapes": {name: repr(SHAPES[name]) for name in args.shapes},
        "seed": args.seed,
        "ratios": rows,
        "cells": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
