"""What metrics cost the scheduler, in microseconds: a step's look at the clock, a look at what has
changed when nothing has, publishing when all counters have, and a request's match and end.

python -m launch.bench.publish --out out/publish.json
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from launch.bench.machine import facts
from sglang_ext.adapter.metrics import DeviceSizes, IndexMetrics
from sglang_ext.adapter.prompt_tokens import Found
from sglang_ext.arguments import Parser, output_file
from sglang_ext.core.host.arena import Arena, shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes

LABELS = {"cache_type": "SwaHiCache", "tp_rank": 0, "pp_rank": 0, "dp_rank": 0}
HOST_BYTES = 64 << 30
PAGE_BYTES = (1 << 20, 1 << 19)
PATH = 200
"""Pages of a request."""


def microseconds(call: Callable[[], None], calls: int, rounds: int = 7) -> float:
    """Of one call: the median of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(statistics.median(times), 3)


def measure() -> dict[str, float]:
    """Microseconds of each kind of step."""
    engine = SimEngine(Geometry(64, 1024), Sizes(512, 512, 512, 512, eviction="learned"))
    arena = Arena(shape_for(HOST_BYTES, tuple((size // 2, size // 2) for size in PAGE_BYTES), 1))
    pages = np.concatenate([arena.allocate(0, 1000), arena.allocate(1, 1000)])  # type: ignore[list-item]
    assert len(pages) == 2000
    metrics = IndexMetrics(engine.index, LABELS, DeviceSizes(PAGE_BYTES, (1 << 35, 1 << 34)), arena)
    counters = engine.index.counters
    names = [field.name for field in dataclasses.fields(counters) if field.type in (int, "int")]

    def change() -> None:
        for name in names:
            setattr(counters, name, getattr(counters, name) + 1)
        metrics.publish(at_once=True)

    rows = np.arange(PATH, dtype=np.int64)
    req = SimpleNamespace(rid="r", retracted_stain=False, origin_input_ids=range(PATH * 64))
    req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = 64, 64, 0

    def serve() -> None:
        metrics.matched(req, rows, Found(128, 128, 128))  # type: ignore[arg-type]
        metrics.ended(req, rows)  # type: ignore[arg-type]

    return {
        "not_due": microseconds(metrics.publish, 20_000),
        "due_nothing_changed": microseconds(lambda: metrics.publish(at_once=True), 500),
        "due_every_counter_changed": microseconds(change, 200),
        "match_and_end": microseconds(serve, 2000),
    }


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_file, default=Path("out/publish.json"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        # as on a server: values are in files that the main process reads
        assert "prometheus_client" not in sys.modules, "it reads the variable when it is imported"
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        result = {"machine": facts(), "microseconds": measure()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["microseconds"], indent=1))


if __name__ == "__main__":
    main()
