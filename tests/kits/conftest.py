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
            if kit.means_something(cell):
                for test in kit.tests:
                    yield cell, kit, test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The whole matrix, or the part that the registry selects."""
    if "kit" not in metafunc.fixturenames:
        return
    whole = metafunc.config.getoption("--all-kits")
    chosen = [one for one in everything() if whole or registry.selected(*one)]
    metafunc.parametrize(
        ("cell", "kit", "test"),
        [
            pytest.param(
                *(cell, kit, test),
                id=f"{cell.name}-{kit.name}-{test}",
                marks=[pytest.mark.full] if (cell, kit.name) in registry.FULL and not whole else [],
            )
            for cell, kit, test in chosen
        ],
    )


def complaint(text: str) -> str:
    """The line of a report that names the error, or the assertion that names none."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line[:1] == "E"]
    errors = [line for line in lines if "Error: " in line and "Traceback" not in line]
    asserts = [line for line in lines if line.startswith("assert ") and "Traceback" not in line]
    return (errors or asserts or [""])[-1][:200]


class Results:
    """Adds what each test said to a JSON file, for the table."""

    def __init__(self, out: Path) -> None:
        self._out = out
        out.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        if report.when != "call" and report.outcome == "passed":
            return
        known = json.loads(self._out.read_text()) if self._out.exists() else {}
        known[report.nodeid.partition("[")[2].rstrip("]")] = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "said": complaint(str(report.longrepr or "")),
        }
        self._out.write_text(json.dumps(known, indent=1, sort_keys=True))


def pytest_configure(config: pytest.Config) -> None:
    """Keep results if a file is named for them."""
    if out := config.getoption("--kits-out", default=None):
        config.pluginmanager.register(Results(out))
