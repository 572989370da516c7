"""Lines that docs/troubleshooting.md quotes are logged or raised by the source.

A quote is one line in a block of kind ``text``, or ``text engine`` for a line of the engine; ``…``
stands for what differs.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fixtures.documents import blocks

PAGE = ROOT / "docs" / "troubleshooting.md"
CHANGES = "\0"
"""In a template: a value stands here."""
LEAST_LETTERS = 12
"""Of a text that tells anything: ``%s`` alone would be every line."""
ENGINE = ("managers/tokenizer_manager.py", "disaggregation/mooncake/conn.py")
"""Files of the engine whose lines are quoted."""


def quoted(kind: str) -> list[str]:
    """Lines of a kind."""
    found = (text for name, text in blocks(PAGE) if name == kind)
    return [line.strip() for text in found for line in text.splitlines()]


def text_of(node: ast.AST) -> str:
    """What an expression makes, with ``CHANGES`` for every value that is not known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-\d.]*[sdrf]", CHANGES, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return CHANGES


def texts(files: list[Path]) -> Iterator[str]:
    """Texts of the source."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kinds):
                yield text_of(node).strip()


def tells(text: str) -> bool:
    """Whether it is more than a place for values."""
    return sum(letter.isalpha() for letter in text) >= LEAST_LETTERS


@functools.cache
def source(kind: str) -> tuple[set[str], list[re.Pattern[str]]]:
    """Of the package, or of the engine: its texts that tell something, and what lines that are
    made from its texts look like, those that tell most first."""
    files = sorted((ROOT / "sglang_ext").rglob("*.py"))
    if kind == "text engine":
        spec = importlib.util.find_spec("sglang")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        files = [Path(spec.submodule_search_locations[0]) / "srt" / name for name in ENGINE]
    found = set(texts(files))
    forms = ("(.*)".join(re.escape(part) for part in text.split(CHANGES)) for text in found)
    return {text for text in found if tells(text)}, [re.compile(form) for form in forms]


def said(line: str, kind: str = "text") -> bool:
    """Whether the source says this line: one of its texts, with values in it. A text that is
    hardly more than places for values counts with a value that tells something."""
    known, forms = source(kind)
    for form in forms:
        if match := form.fullmatch(line):
            fixed = line
            for value in match.groups():
                fixed = fixed.replace(value, "", 1)
            if tells(fixed) or any(value in known for value in match.groups()):
                return True
    return False


@pytest.mark.parametrize("kind", ["text", "text engine"])
def test_lines_are_in_the_source(kind: str) -> None:
    lines = quoted(kind)
    # the class of the errors puts the name of the package in front of a message
    nobody_says = [
        line
        for line in lines
        if not (said(line, kind) or said(line.removeprefix("sglang-ext: "), kind))
    ]
    assert len(lines) > 2
    assert not nobody_says


@pytest.mark.parametrize(
    "line",
    [
        "sglang-ext: the cache of this computer",
        "storage: 3 errors so far, the first: …",
        "sglang-ext: host memory is painted for CUDA: … s",
        "… of anything …",
    ],
)
def test_a_line_that_nobody_says_is_found(line: str) -> None:
    assert not said(line)
    assert not said(line.removeprefix("sglang-ext: "))
