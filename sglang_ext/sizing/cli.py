"""How much host memory is worth it: hit rate, bytes moved and recompute against its size.

    sglang-ext size --model gpt-oss-20b --device-tokens 200000 \\
        --traffic chat --host-gb 2 4 8 --plot out/size.png

Requests are replayed one at a time against the cache's own index, for every host size
and write policy. Beside each hit rate is what LRU and MIN, which knows the requests to come, would
find in a cache of as many bytes without a copy that is there twice and without windows on the host.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sglang_ext.arguments import Parser, input_file, number, output_file, whole
from sglang_ext.core.eviction_policy import POLICIES, EvictionPolicy
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.planning.model import COMPRESSED, PRESETS, ModelShape, Shape
from sglang_ext.sizing import plot, traces
from sglang_ext.sizing.bounds import Bounds
from sglang_ext.sizing.traffic import SHAPES, Tokens, interleave

if TYPE_CHECKING:
    from sglang_ext.sizing.replay import Budget, Result

_VOCABULARY = 1 << 17
_GB = 1e9
_EVICTIONS = sorted(n for n, policy in POLICIES.items() if policy is not EvictionPolicy.TLRU)
"""Those that need no parameters."""
_MOST_GB = 1e6
_MOST_PAGES = 1 << 26
"""Of a table; more of them take longer than anybody waits."""
Requests = Callable[[], Iterable[tuple[Tokens, Tokens]]]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = Parser(
        prog="sglang-ext size",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model, all of it; the rest is of one rank")
    model.add_argument("--model", choices=sorted({**PRESETS, **COMPRESSED}), help="a known one")
    for field in dataclasses.fields(ModelShape):
        model.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            default=argparse.SUPPRESS,
            help="instead of the known model's",
        )
    engine = parser.add_argument_group("engine, named as its own options")
    engine.add_argument(
        "--tp", type=whole(1), default=1, help="ranks that share the heads of a layer"
    )
    engine.add_argument("--page-size", type=whole(1), default=64)
    engine.add_argument("--chunked-prefill-size", type=whole(1), default=8192)
    engine.add_argument(
        "--device-tokens", type=whole(1), default=200_000, help="full-attention pool"
    )
    engine.add_argument(
        "--swa-full-tokens-ratio",
        type=number(above=0, most=1),
        default=argparse.SUPPRESS,
        help="default: the engine's for the model",
    )
    engine.add_argument(
        "--host-gb", type=number(0, _MOST_GB), nargs="+", default=[0, 2, 4, 8], help="10^9 bytes"
    )
    engine.add_argument(
        "--policy",
        nargs="+",
        choices=[policy.value for policy in WritePolicy],
        default=[WritePolicy.WRITE_THROUGH.value],
        help="--hicache-write-policy",
    )
    engine.add_argument(
        "--eviction",
        nargs="+",
        choices=_EVICTIONS,
        default=["lru"],
        help="--radix-eviction-policy",
    )
    engine.add_argument(
        "--checkpoint-tokens",
        type=whole(0),
        help="between windows kept inside a prompt; 0 keeps none; default: from the model",
    )
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--traffic", choices=sorted(SHAPES), default="chat")
    traffic.add_argument(
        "--sessions", type=whole(1), help="of that traffic; default: the shape's own"
    )
    traffic.add_argument("--active", type=whole(1), default=32, help="sessions at the same time")
    traffic.add_argument("--seed", type=whole(0), default=1)
    traffic.add_argument(
        "--trace",
        type=input_file,
        help="JSON lines instead: token ids, or hash ids as in Mooncake's and Qwen's traces",
    )
    traffic.add_argument(
        "--block-size",
        type=whole(1),
        default=traces.MOONCAKE_BLOCK,
        help=f"tokens behind a hash id: {traces.MOONCAKE_BLOCK} in Mooncake's traces, "
        f"{traces.QWEN_BLOCK} in Qwen's",
    )
    parser.add_argument("--out", type=output_file, default=Path("out/size.json"))
    parser.add_argument("--plot", type=plot.file, help="PNG or SVG file to draw")
    args = parser.parse_args(argv)
    try:
        args.shape = _model(args).on(args.tp)
        if not hasattr(args, "swa_full_tokens_ratio"):
            args.swa_full_tokens_ratio = args.shape.default_swa_ratio
    except ValueError as error:
        parser.error(str(error))
    try:
        _check_sizes(args)
        args.start, args.count, args.unit = requests(args)
    except (ValueError, traces.TraceError) as error:
        parser.error(str(error))
    return args


def _check_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes with which nothing could be replayed."""
    geometry = args.shape.geometry(args.page_size)
    pages, windows = args.device_tokens // geometry.page_tokens, _window_pages(args)
    if pages == 0 or windows == 0:
        raise ValueError(
            f"--device-tokens {args.device_tokens} with --swa-full-tokens-ratio "
            f"{args.swa_full_tokens_ratio}: {pages} pages of {geometry.page_tokens} tokens and "
            f"{windows} for windows; at least one of each is needed"
        )
    page_bytes = min(map(sum, args.shape.page_planes(geometry.page_tokens)))
    for host_gb in args.host_gb:
        on_host = int(host_gb * _GB) // page_bytes
        if pages + on_host > _MOST_PAGES:
            raise ValueError(
                f"--host-gb {host_gb:g} and --device-tokens {args.device_tokens} are "
                f"{pages + on_host} pages; at most {_MOST_PAGES} can be replayed"
            )


def _model(args: argparse.Namespace) -> Shape:
    fields = [field.name for field in dataclasses.fields(ModelShape)]
    given = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    if (known := COMPRESSED.get(args.model)) is not None:
        if given:
            raise ValueError(f"--model {args.model} has no {', '.join(given)}")
        return known
    if args.model:
        return dataclasses.replace(PRESETS[args.model], **given)
    try:
        return ModelShape(**given)
    except TypeError as error:
        raise ValueError(f"without --model its shape is needed: {error}") from error


def requests(args: argparse.Namespace) -> tuple[Requests, int, int]:
    """(a function that starts the requests from the first one, how many they are, tokens of the
    blocks for the bounds).

    Raises:
        TraceError: the trace cannot be replayed.
    """
    page = args.shape.geometry(args.page_size).page_tokens
    if args.trace is not None:
        trace = traces.check(args.trace, args.block_size)
        unit = args.block_size if trace.hashed else page
        return functools.partial(traces.read, args.trace, args.block_size), trace.requests, unit
    shape = SHAPES[args.traffic]()
    if args.sessions:
        shape = dataclasses.replace(shape, sessions=args.sessions)
    replayed = functools.partial(interleave, shape, args.active, _VOCABULARY, args.seed)
    return replayed, shape.turns, page


def budget(args: argparse.Namespace, host_gb: float) -> "Budget":
    """Memory of the tiers, in pages of the table."""
    from sglang_ext.sizing.replay import Budget

    page = args.shape.geometry(args.page_size).page_tokens
    pages = args.device_tokens // page
    return Budget(pages, _window_pages(args), int(host_gb * _GB))


def _window_pages(args: argparse.Namespace) -> int:
    pages = args.device_tokens // args.shape.geometry(args.page_size).page_tokens
    return int(pages * args.swa_full_tokens_ratio)


def row(
    policy: str, host_gb: float, result: "Result", bound: dict[str, float | int]
) -> dict[str, Any]:
    """One line of the report."""
    best = bound["min_bound"]
    return {
        "policy": policy,
        "host_gb": host_gb,
        "hit_rate": result.hit_rate,
        **bound,
        "of_min": result.hit_rate / best if best else None,
        **dataclasses.asdict(result),
    }


def bounds(args: argparse.Namespace) -> dict[float, dict[str, float | int]]:
    """By host size: tokens that device and host have room for, and what LRU and MIN find there."""
    of = Bounds(args.start(), args.unit, args.shape.geometry(args.page_size).page_tokens)
    rooms = {
        host_gb: args.device_tokens + int(host_gb * _GB / args.shape.full_token_bytes)
        for host_gb in args.host_gb
    }
    return {
        host_gb: {"room": room, "lru_bound": of.lru(room), "min_bound": of.best(room)}
        for host_gb, room in rooms.items()
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report for a reader."""
    lines = [
        f"{'policy':<34} host GB  hit rate    LRU    MIN  of MIN  on host  written GB  "
        "loaded GB  again"
    ]
    for entry in rows:
        prompt = max(1, entry["prompt"])
        of_min = "none" if entry["of_min"] is None else f"{entry['of_min']:.2f}"
        lines.append(
            f"{entry['policy']:<34} {entry['host_gb']:>7g} {entry['hit_rate']:>9.3f} "
            f"{entry['lru_bound']:>6.3f} {entry['min_bound']:>6.3f} {of_min:>7} "
            f"{entry['from_host'] / prompt:>8.3f} {entry['written_bytes'] / _GB:>11.2f} "
            f"{entry['loaded_bytes'] / _GB:>10.2f} {entry['again'] / prompt:>6.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Replay, print, write and draw."""
    args = parse_args(argv)
    rows = replay_all(args)
    print(table(rows))
    if rejected := max(entry["rejected"] for entry in rows):
        print(f"{rejected} of {args.count} requests did not fit the device", file=sys.stderr)
    own = ("shape", "start", "count", "unit")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    report = {"model": dataclasses.asdict(args.shape), "settings": settings, "cells": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, default=str))
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot.draw(rows, args.plot)
    return 0


def replay_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the report for each policy and host size."""
    # with the compiled loops: not for those who ask for help
    from sglang_ext.sizing.replay import Replay

    cells = list(itertools.product(args.policy, args.eviction, sorted(set(args.host_gb))))
    rows, bound = [], bounds(args)
    with tqdm(total=args.count * len(cells), unit="req", smoothing=0.05) as progress:
        for write, eviction, host_gb in cells:
            replay = Replay(
                args.shape,
                budget(args, host_gb),
                WritePolicy(write),
                args.page_size,
                args.chunked_prefill_size,
                eviction,
                args.checkpoint_tokens,
            )
            policy = write if eviction == "lru" else f"{write}, {eviction}"
            progress.set_description(f"{policy}, {host_gb:g} GB")
            for prompt, answer in args.start():
                replay.serve(prompt, answer)
                progress.update()
            rows.append(row(policy, host_gb, replay.result(), bound[host_gb]))
    return rows
