"""docs/operations.md says of each refusal of the core what it is and what to do."""

import ast
import re

from sglang_ext.adapter.metric_definitions import METRICS
from sglang_ext.core.plan import DeclineReason
from tests.conftest import ROOT

SECTION = (ROOT / "docs" / "operations.md").read_text().split("\n## What is declined\n")[1]
TABLE = SECTION.partition("\n## ")[0]
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)


def given() -> set[str]:
    """Reasons that the package gives, by name."""
    names = set()
    for file in (ROOT / "sglang_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names |= {node.attr} if node.value.id == "DeclineReason" else set()
    return names


def test_every_reason_has_its_row() -> None:
    rows = ROW.findall(TABLE)
    assert [reason for reason, _, _ in rows] == [reason.value for reason in DeclineReason]
    assert all(len(what) > 20 and len(to_do) > 5 for _, what, to_do in rows)


def test_every_reason_is_given_somewhere() -> None:
    assert given() == {reason.name for reason in DeclineReason}


def test_metrics_that_the_row_names_are_there() -> None:
    ours = {definition.name for definition in METRICS}
    named = set(re.findall(r"`(?:sglang_ext:)?(\w+_(?:total|seconds|tokens))\b", TABLE))
    assert {"declined_total", "transfer_seconds", "storage_operations_total"} <= named <= ours
