"""Does a scheduler step wait for copies to the host? Steps with copies at full speed
against steps with copies slowed 100 times.

The same load on the same server, twice. If a step waited for a copy, its time would
grow with the copies'.

    python -m tests.soak.waits --out out/waits.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.server import CPU, OURS, running
from launch.traffic import Traffic
from sglang_ext.arguments import Parser, output_file
from sglang_ext.core.write_policy import WritePolicy
from tests.soak.server import COMMON, configuration, served
from tests.soak.traffic import ask

ROOT = Path(__file__).resolve().parents[2]


def measure(slowdown: int, policy: str, folder: Path) -> dict[str, Any]:
    """Step times of one run, in milliseconds."""
    name = f"{policy}-{slowdown}"
    trace = folder / f"{name}.steps"
    setup = configuration(policy, page=16, tokens=4096)
    environment = {
        **CPU,
        "SGLANG_EXT_TEST_BACKUP_SLOWDOWN": str(slowdown),
        "SGLANG_EXT_TEST_STEP_TRACE": str(trace),
    }
    arguments = [*served(setup.window).arguments(), *COMMON, *OURS, *setup.options]
    with running(arguments, folder / f"{name}.log", environment) as server:
        ask(server, Traffic(conversations=24, rounds=4, shared=150, parallel=8))
    steps, cache, in_flight = np.loadtxt(trace, unpack=True)
    return {
        "policy": policy,
        "backup_slowdown": slowdown,
        "steps": len(steps),
        "steps_with_backups_in_flight": int((in_flight > 0).sum()),
        "step_ms": summary(steps * 1e3),
        "cache_part_ms": summary(cache * 1e3),
    }


def summary(values: NDArray[np.float64]) -> dict[str, float]:
    """Median and tail."""
    p50, p99, largest = np.percentile(values, [50, 99, 100]).round(3).tolist()
    return {"p50": p50, "p99": p99, "max": largest}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=[policy.value for policy in WritePolicy],
        default=["write_back"],
    )
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "waits.json")
    return parser.parse_args(argv)


def main() -> None:
    """Both runs, for each policy."""
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = [measure(s, policy, args.out.parent) for policy in args.policy for s in (1, 100)]
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
