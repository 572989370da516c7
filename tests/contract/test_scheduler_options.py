"""The page on scheduler options against the engine's own list, and against the tests it names."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from sglang_ext.adapter.options import EARLY_REFUSALS, REFUSALS
from tests.conftest import ROOT
from tests.e2e.test_scheduler_options import SERVERS

PAGE = (ROOT / "docs" / "scheduler-options.md").read_text()
ABOUT_ORDER = re.compile(
    "schedul|batch|chunk|preempt|retract|priorit|queue|overlap|interval|running_req|conserv|delay"
    "|prefill|micro|pdmux|dllm_algorithm$|lora_drain|sleep_on_idle|reserved_decode|incremental"
)


def engine_options() -> Iterator[tuple[str, str]]:
    """(namespace, field) of every option, read from the engine's source."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    fields = Path(spec.submodule_search_locations[0]) / "srt" / "arg_groups" / "fields"
    for file in sorted(fields.glob("*.py")):
        for kind in ast.parse(file.read_text()).body:
            for node in kind.body if isinstance(kind, ast.ClassDef) else ():
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    yield kind.name, node.target.id


def option(field: str) -> str:
    """As on the command line."""
    return "--" + field.replace("_", "-")


def test_no_option_of_the_scheduler_is_left_out() -> None:
    fields = [
        field
        for space, field in engine_options()
        if not field.startswith("_")
        and space != "Spec"  # what drafts, and not how requests are batched
        and (space == "Schedule" or ABOUT_ORDER.search(field))
    ]
    assert len(fields) > 60, "the engine keeps its options elsewhere now"
    missing = [option(field) for field in fields if f"`{option(field)}`" not in PAGE]
    assert not missing
    gone = set(re.findall(r"`(--[a-z0-9-]+)`", PAGE)) - {option(f) for _, f in engine_options()}
    assert not gone


def rows() -> Iterator[tuple[list[str], str]]:
    """(options, what is said of them) of each row of a table."""
    options: list[str] = []
    for line in PAGE.splitlines():
        if line.startswith("| "):
            cells = line.strip("| ").split(" | ") if line[2] != "|" else line[3:].split(" | ")
            named = re.findall(r"`(--[a-z0-9-]+)`", cells[0])
            options = named or options
            yield options, line


def test_what_works_is_in_the_test_that_is_named() -> None:
    checked = 0
    for options, said in rows():
        for names in re.findall(r"\[([a-z, ]+)\]", said):
            for name in names.split(", "):
                checked += 1
                assert set(options) & set(SERVERS[name]), (options, name)
    assert checked > 30


def test_what_is_refused_is_refused_by_that_name() -> None:
    refused = {refusal.option for refusal in (*EARLY_REFUSALS, *REFUSALS)}
    for options, said in rows():
        for other in re.findall(r"refused with `(--[a-z-]+)`", said):
            assert other in refused
        if re.search(r"\| refused \|", said):
            assert set(options) <= refused, options
