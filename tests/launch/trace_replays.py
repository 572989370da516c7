"""Replays of a small trace against our cache, in a process of their own: the engine keeps
process-wide state. Prints what was measured, the bounds, and what is said when KV that is found is
not that of its tokens, for each kind. Of DeepSeek-V4 what was measured with ours and with stock's.

    python -m tests.launch.trace_replays FILE [MODEL]
"""

import argparse
import json
import sys

from launch.bench import trace

OPTIONS = (
    *("--block-size", "64", "--device-tokens", "16384", "--chunk", "1024", "--host-gb", "1"),
    *("--system", "ours", "--verify"),
)
PAGES_OF_BYTES = (
    *("--block-size", "64", "--device-tokens", "32768", "--chunk", "1024", "--host-gb", "0.5"),
    *("--system", "ours", "stock"),
)


def overwritten(args: argparse.Namespace, kind: str) -> str:
    """What is said about a request that came before, when KV of this kind was overwritten."""
    from launch.bench.trace_caches import Cache, Sizes
    from launch.bench.trace_models import MODELS
    from launch.bench.trace_requests import Scheduler, WrittenIds

    sizes = Sizes(MODELS[args.model], args.device_tokens, 0, args.page, args.chunk, longest=10_000)
    cache = Cache("ours", sizes)
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
    file, *models = sys.argv[1:]
    for model in models:
        args = trace.parse_args(["--trace", file, *PAGES_OF_BYTES, "--model", model])
        for cell in trace.cells(args):
            print(json.dumps(trace.measure(args, cell)))
        return
    args = trace.parse_args(["--trace", file, *OPTIONS])
    (cell,) = trace.cells(args)
    print(json.dumps(trace.measure(args, cell)))
    print(json.dumps(trace.bounds(args)))
    for kind in ("full", "swa"):
        print(json.dumps(overwritten(args, kind)))


if __name__ == "__main__":
    main()
