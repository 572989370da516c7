"""Which kits run, and where their results go."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits import cells, registry
from tests.kits.cells import Cell
from tests.kits.registry import Kit


def everything() -> Iterator[tuple[Cell, Kit, str]]:
    """(cell, kit, test), so ordered that a server serves as many as it can."""
    for cell in cells.ALL:
        for kit in sorted(registry.RUN, key=lambda kit: (kit.options, kit.environment)):
            if cell.tier in kit.tiers:
                for test in kit.tests:
                    yield cell, kit, test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The whole matrix, or the part that the registry selects."""
    if "kit" not in metafunc.fixturenames:
        return
    whole = metafunc.config.getoption("--all-kits")
    chosen = [one for one in everything() if whole or registry.selected(*one)]
    names = [f"{cell.name}-{kit.name}-{test}" for cell, kit, test in chosen]
    metafunc.parametrize(("cell", "kit", "test"), chosen, ids=names)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a test said, for the table."""
    if report.when == "call" or report.outcome != "passed":
        _results[report.nodeid.partition("[")[2].rstrip("]")] = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "said": str(report.longrepr or "").strip().splitlines()[-1:],
        }


_results: dict[str, dict[str, object]] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add the results to those of earlier runs."""
    out: Path | None = session.config.getoption("--kits-out")
    if out is not None:
        known = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**known, **_results}, indent=1, sort_keys=True))
