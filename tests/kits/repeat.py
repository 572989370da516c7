"""The kit of branching conversations over and over on one server: how many runs lose tokens.

python -m tests.kits.repeat --page 64 --runs 50
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.models.text import ready_made_text
from launch.server import CPU, STRICT_CHECKS, running
from sglang_ext.arguments import Parser, whole
from tests.kits.cells import PAGES, POLICIES, Cell
from tests.kits.test_kits import COMMON


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=whole(1), default=50)
    parser.add_argument("--page", type=int, choices=PAGES, default=64)
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0])
    parser.add_argument("--tokens", type=whole(1), default=512, help="length of an answer")
    parser.add_argument("--test", default="test_multiturn_prefill_cache_hit_branching")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if any run failed."""
    args = parse_args(argv)
    from tests.kits import absent_datasets, classes  # noqa: F401

    cell = Cell(args.page, "host", args.policy)
    folder = Path(tempfile.mkdtemp(prefix="kits-"))
    options = ["--model-path", str(ready_made_text()), *COMMON, *cell.options(folder / "storage")]
    bad = 0
    with running(options, folder / "log", {**CPU, **STRICT_CHECKS}) as server:
        kind = classes.Unified.on(server, cell, folder)
        kind.max_new_tokens = args.tokens
        for run in range(args.runs):
            began, problem = time.monotonic(), ""
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    getattr(kind(args.test), args.test)()
            except AssertionError as error:
                bad, problem = bad + 1, str(error)
            print(f"run {run}: {problem or 'ok'} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{bad} of {args.runs} runs lost tokens")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
