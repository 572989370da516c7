"""The failure catalogue names every known failure once, and tests that exist."""

import ast
import functools
import re

import pytest

from tests.conftest import ROOT

SECTIONS = {"A": 11, "B": 12, "C": 8, "D": 6, "E": 10, "F": 4, "G-": 9, "H": 7, "J": 4}
"""Each has a file of scenarios below ``tests/failures``."""
LATER = {"K": 5, "L": 7, "M": 7, "N": 32, "P": 4, "Q": 4}
"""Their tests are with the part that they are about."""
ALL = {**SECTIONS, **LATER}
IDS = [f"{letter}{number}" for letter, last in ALL.items() for number in range(1, last + 1)]
NO_TEST = "—"
CRASHES = {
    "cascade evict with a lock held": "test_cascade_evict_with_a_lock_held",
    "protected length after re-match": "test_protected_length_after_rematch",
    "page in device and host LRU": "test_page_in_device_and_host_lru",
}
TEXT = (ROOT / "docs" / "failure-catalogue.md").read_text()


def rows() -> list[list[str]]:
    """Cells of the tables, without their heads."""
    lines = [line.strip() for line in TEXT.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "id" and set(row[0]) != {"-"}]


@functools.cache
def functions(path: str) -> set[str]:
    """Functions on the top level of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_failure_stands_in_the_catalogue_once() -> None:
    assert [row[0] for row in rows()] == IDS


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_says_what_broke_why_not_here_and_names_its_tests(row: list[str]) -> None:
    assert len(row) == 4
    _, broke, reason, tests = row
    assert broke and reason
    assert tests == NO_TEST or re.fullmatch(r"`[^`]+`(, `[^`]+`)*", tests)


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[^`]+)::(\w+)`", TEXT)
    assert len(named) > len(IDS)
    missing = [f"{path}::{name}" for path, name in named if name not in functions(path)]
    assert not missing, missing
    in_tables = [test for row in rows() for test in re.findall(r"`([^`]+)`", row[3])]
    assert all("::test_" in test for test in in_tables)


@pytest.mark.parametrize("crash", CRASHES)
def test_the_production_crashes_are_named_with_their_tests(crash: str) -> None:
    section = TEXT.partition("## The three production crashes")[2]
    _, found, rest = section.partition(f"`{crash}`")
    assert found
    assert rest[: rest.index("`\n")].endswith(f"::{CRASHES[crash]}")


def test_every_scenario_belongs_to_a_row() -> None:
    files = sorted((ROOT / "tests" / "failures").glob("test_*.py"))
    scenarios = {name for file in files for name in functions(str(file.relative_to(ROOT)))}
    scenarios = {name for name in scenarios if name.startswith("test_")}
    unnamed = {name for name in scenarios if f"::{name}`" not in TEXT}
    assert len(files) == len(SECTIONS)
    assert not unnamed, unnamed
