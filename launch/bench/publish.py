"""What metrics cost the scheduler, in microseconds: a step's look at the clock, the steps that
publish, and a request's match and end.

    python -m launch.bench.publish --out out/publish.json
    python -m launch.bench.publish --beside ANOTHER_CHECKOUT

With ``--beside`` the package of another checkout is measured too, in turns with this one.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from launch.bench.machine import facts
from sglang_ext.adapter import metrics as published
from sglang_ext.adapter.engine_metrics import HostTierFeed
from sglang_ext.adapter.metrics import DeviceSizes, IndexMetrics
from sglang_ext.adapter.prompt_tokens import Found
from sglang_ext.arguments import Parser, input_folder, output_file
from sglang_ext.core.host.arena import Arena, shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from sglang_ext.transfer.job import Ended

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"cache_type": "SwaHiCache", "tp_rank": 0, "pp_rank": 0, "dp_rank": 0}
HOST_BYTES = 64 << 30
PAGE_BYTES = (1 << 20, 1 << 19)
PATH = 200
"""Pages of a request."""
DUE_S = 10.0
"""After so long the next step publishes."""
ROUNDS, STEPS = 200, 128
"""Rounds of publishing that are measured, and steps of each: more than it takes."""
REQUESTS, JOBS = 8, 4
"""That have ended since the last round, where much has; jobs of each direction."""
TURNS = 4


def microseconds(call: Callable[[], None], calls: int, rounds: int = 7) -> float:
    """Of one call: the median of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(statistics.median(times), 3)


def of_steps(
    publish: Callable[[], None], clock: SimpleNamespace, change: Callable[[], None]
) -> dict[str, float]:
    """Microseconds of the costliest step of a round, and of all its steps that do more than look at
    the clock. Of each step the median over rounds, so one that was interrupted does not count.

    Args:
        change: brings the next round something to publish.
    """
    looks_only = microseconds(publish, 2000)
    times = np.empty((ROUNDS, STEPS))
    for row in times:
        change()
        clock.now += DUE_S
        for step in range(STEPS):
            start = time.perf_counter()
            publish()
            row[step] = (time.perf_counter() - start) * 1e6
    of_each = np.median(times, axis=0)
    at_work = of_each > 2 * looks_only + 0.2
    return {
        "costliest_step": round(float(of_each.max()), 2),
        "round": round(float(of_each[at_work].sum()), 2),
        "steps": int(at_work.sum()),
    }


def measure() -> dict[str, float | dict[str, float]]:
    """Of each kind of step."""
    from sglang.srt.observability.metrics_collector import RadixCacheMetricsCollector

    engine = SimEngine(Geometry(64, 1024), Sizes(512, 512, 512, 512, eviction="learned"))
    arena = Arena(shape_for(HOST_BYTES, tuple((size // 2, size // 2) for size in PAGE_BYTES), 1))
    pages = np.concatenate([arena.allocate(0, 1000), arena.allocate(1, 1000)])  # type: ignore[list-item]
    assert len(pages) == 2000
    metrics = IndexMetrics(engine.index, LABELS, DeviceSizes(PAGE_BYTES, (1 << 35, 1 << 34)), arena)
    collector = RadixCacheMetricsCollector(LABELS)
    metrics.host = HostTierFeed(collector, arena, 64, WritePolicy.WRITE_THROUGH)
    counters = engine.index.counters
    names = [field.name for field in dataclasses.fields(counters) if field.type in (int, "int")]
    rows = np.arange(PATH, dtype=np.int64)
    req = SimpleNamespace(rid="r", retracted_stain=False, origin_input_ids=range(PATH * 64))
    req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = 64, 64, 0

    def serve() -> None:
        metrics.matched(req, rows, Found(128, 128, 128))  # type: ignore[arg-type]
        metrics.ended(req, rows)  # type: ignore[arg-type]

    def count() -> None:
        for name in names:
            setattr(counters, name, getattr(counters, name) + 1)

    def work() -> None:
        count()
        for _ in range(REQUESTS):
            serve()
        jobs = [Ended(0.001, ((0, 3), (1, 2)))] * JOBS
        ended = [(jobs, jobs)]
        metrics.take_ended = lambda: ended.pop() if ended else ([], [])

    found: dict[str, float | dict[str, float]] = {
        "not_due": microseconds(metrics.publish, 20_000),
        "match_and_end": microseconds(serve, 2000),
    }
    clock = SimpleNamespace(now=time.monotonic())
    set_time = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    with mock.patch.object(published, "time", set_time):
        for kind, change in {
            "nothing_changed": lambda: None,
            "every_counter_changed": count,
            "requests_and_copies_ended": work,
        }.items():
            found[kind] = of_steps(metrics.publish, clock, change)
    return found


def measured(checkout: Path) -> dict[str, float | dict[str, float]]:
    """``measure`` with the package of a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        # this bench, on that package; as on a server, values are in files
        for name, origin in (("launch", ROOT), ("sglang_ext", checkout)):
            (Path(place) / name).symlink_to(origin / name)
        values = Path(place) / "values"
        values.mkdir()
        variables = {"PYTHONPATH": place, "PROMETHEUS_MULTIPROC_DIR": str(values)}
        code = "import json; from launch.bench.publish import measure; print(json.dumps(measure()))"
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=place,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, float | dict[str, float]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def medians(turns: Sequence[dict[str, float | dict[str, float]]]) -> dict[str, object]:
    """Of all turns, figure by figure."""
    of_all: dict[str, object] = {}
    for name, first in turns[0].items():
        found = [turn[name] for turn in turns]
        if isinstance(first, dict):
            of_all[name] = medians(found)  # type: ignore[arg-type]
        else:
            of_all[name] = statistics.median(found)  # type: ignore[type-var]
    return of_all


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_file, default=Path("out/publish.json"))
    parser.add_argument("--beside", type=input_folder, help="a checkout to compare with")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, write and print."""
    args = parse_args()
    checkouts = {"this": ROOT, **({"beside": args.beside.resolve()} if args.beside else {})}
    turns: dict[str, list[dict[str, float | dict[str, float]]]] = {name: [] for name in checkouts}
    for turn in range(TURNS):
        # whoever goes first in one turn goes last in the next
        for name in list(checkouts)[:: -1 if turn % 2 else 1]:
            turns[name].append(measured(checkouts[name]))
    result = {name: medians(found) for name, found in turns.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": facts(), "microseconds": result}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
