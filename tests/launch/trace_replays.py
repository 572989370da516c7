"""Replays of a small trace against our cache, in a process of their own: the engine keeps
process-wide state. Prints what was measured, the bounds, and what is said when KV that is found is
not that of its tokens, for each kind.

    python -m tests.launch.trace_replays FILE
"""

import argparse
import json
import sys

from launch.bench import trace

OPTIONS = (
    *("--block-size", "64", "--device-tokens", "16384", "--chunk", "1024", "--host-gb", "1"),
    *("--system", "ours", "--verify"),
)


def overwritten(args: argparse.Namespace, kind: str) -> str:
    """What is said about a request that came before, when KV of this kind was overwritten."""
    from launch.bench.trace_caches import Cache, Sizes
    from launch.bench.trace_requests import Scheduler, WrittenIds

    cache = Cache("ours", Sizes(args.device_tokens, 0, args.page, args.chunk, longest=10_000))
    scheduler = Scheduler(cache, WrittenIds(cache))
    prompt, answer = next(trace.requests(args))
    scheduler.serve(prompt, answer)
    getattr(cache.pool, f"{kind}_kv_pool").k_buffer[0].zero_()
    try:
        scheduler.serve(prompt, answer)
    except AssertionError as error:
        return str(error)
    return "nothing"


def main() -> None:
    """Measure, and overwrite."""
    args = trace.parse_args(["--trace", sys.argv[1], *OPTIONS])
    (cell,) = trace.cells(args)
    print(json.dumps(trace.measure(args, cell)))
    print(json.dumps(trace.bounds(args)))
    for kind in ("full", "swa"):
        print(json.dumps(overwritten(args, kind)))


if __name__ == "__main__":
    main()
