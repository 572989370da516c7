"""What ``make test`` leaves out is more of a kind that it runs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest
from tests.conftest import ROOT

ON_SERVERS = ("tests/e2e", "tests/kits")
CUT = "- both -"
COLLECT = f"""
import sys, pytest
assert pytest.main(["--collect-only", *sys.argv[1:]]) == 0
print("{CUT}")
assert pytest.main(["--collect-only", "--full", *sys.argv[1:]]) == 0
"""


@pytest.fixture(scope="module")
def selected() -> tuple[list[str], list[str]]:
    """Tests on servers that ``make test`` runs, and those that ``make test-all`` does: by a process
    that imports them once."""
    command = [sys.executable, "-W", "ignore", "-c", COLLECT, *ON_SERVERS]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    short, full = (
        [line for line in part.splitlines() if "::" in line] for part in run.stdout.split(CUT)
    )
    return short, full


def test_every_file_has_a_test_in_the_short_selection(
    selected: tuple[list[str], list[str]],
) -> None:
    short, _ = selected
    files = {str(file.relative_to(ROOT)) for file in _files()}
    assert files == {name.partition("::")[0] for name in short}


def _files() -> Iterator[Path]:
    for folder in ON_SERVERS:
        yield from (ROOT / folder).glob("test_*.py")


def test_the_full_selection_only_adds(selected: tuple[list[str], list[str]]) -> None:
    short, full = selected
    assert set(short) < set(full)


def test_files_that_are_begun_first_are_there() -> None:
    assert not [name for name in conftest.LONGEST_FIRST if not (ROOT / name).exists()]


def test_the_commands_are_those_of_the_makefile() -> None:
    """And CI takes the whole."""
    rules = (ROOT / "Makefile").read_text()
    short, full = (
        rules.partition(f"\n{name}: ")[2].partition("\n\n")[0] for name in ("test", "test-all")
    )
    assert "--full" not in short
    assert "--full" in full
    assert "make test-all" in (ROOT / ".ci" / "run").read_text()
