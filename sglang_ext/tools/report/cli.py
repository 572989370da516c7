"""``sglang-ext report``: hit rates, occupancy, retention, bytes moved, what was computed and why,
and what was declined, as one HTML file that needs nothing else.

Of a running server it looks at ``/metrics`` for some time (start it with ``--enable-metrics``); of
a benchmark it reads the log of ``launch.bench.multiturn`` or the demo's JSON.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sglang_ext.arguments import Parser, input_file, number, output_file, url
from sglang_ext.tools.report.bench import bench_page, read_runs
from sglang_ext.tools.report.observed import observe
from sglang_ext.tools.report.server import server_page
from sglang_ext.tools.scrape import ScrapeError, fetch


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="sglang-ext report", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", type=url, help="of a server, like http://127.0.0.1:30000")
    source.add_argument("--bench", type=input_file, help="what a benchmark has written")
    parser.add_argument(
        "--out", type=output_file, default=Path("report.html"), help="default: report.html"
    )
    parser.add_argument(
        "--seconds", type=number(0), default=60.0, help="to watch a server, default: 60"
    )
    parser.add_argument(
        "--every", type=number(above=0), default=2.0, help="seconds between two looks, default: 2"
    )
    parser.add_argument("--api-key", help="of the server")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: written; 1: the server or the file tells nothing, or the server went away, and
    the report ends there; 2: an argument is not allowed."""
    args = parse_args(arguments)
    fault: Exception | None = None
    try:
        if args.bench is not None:
            text = bench_page(read_runs(args.bench), args.bench.name)
        else:
            when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            look = partial(fetch, args.url, args.api_key, timeout_s=30.0)
            seen, fault = observe(look, args.seconds, args.every)
            text = server_page(seen, args.url, when)
    except ScrapeError as error:
        print(f"sglang-ext report: {error}", file=sys.stderr)
        return 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"is no report of runs: {error}"
        print(f"sglang-ext report: {args.bench or args.url} {said}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"written: {args.out}")
    if fault is not None:
        print(f"sglang-ext report: ended early: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
