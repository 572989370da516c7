"""The page of published lines is written from the lines that tests start servers with."""

import re
import shlex
from collections.abc import Sequence

import pytest

from tests.conftest import ROOT
from tests.contract.test_failure_catalogue import functions
from tests.e2e import launch_lines
from tests.e2e.launch_lines import GPU_ONLY, LINES, SIZES, Line

ALIASES = {"--tp-size": "--tp", "--dp-size": "--dp", "NEXTN": "EAGLE"}
"""The engine takes one for the other."""


def by_name(words: Sequence[str]) -> dict[str, list[str]]:
    """Values of each option; the last one counts."""
    found: dict[str, list[str]] = {}
    for word in (ALIASES.get(word, word) for word in words):
        if word.startswith("--"):
            values = found[word] = []
        else:
            values.append(word)
    return found


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_server_gets_the_options_of_its_line(line: Line) -> None:
    given = [*line.kind.options, *line.options, *line.ranks(), *line.host]
    given += ["--speculative-draft-model-path"] if line.kind.draft is not None else []
    given += ["--kv-events-config"] if line.events is not None else []
    published, here = by_name(shlex.split(line.published)), by_name(given)
    assert {*published} - {*GPU_ONLY} <= {*here}
    different = {
        name
        for name, values in published.items()
        if name not in (*GPU_ONLY, *SIZES) and here[name] != values
    }
    assert not different


def test_the_page_is_that_of_the_lines() -> None:
    assert (ROOT / "docs" / "launch-lines.md").read_text() == launch_lines.page()


def test_every_test_of_the_page_exists() -> None:
    named = {re.fullmatch(r"(.+)::(\w+)", test) for row in launch_lines.rows() for test in row[3]}
    assert named
    assert all(match and match[2] in functions(match[1]) for match in named)
