"""The project's own files keep their promises."""

import ast
from collections.abc import Iterator

from tests.conftest import ROOT

MAX_FILE_LINES = 600


def test_files_stay_small() -> None:
    for file in (ROOT / "sglang_ext").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= MAX_FILE_LINES, file


def _public(nodes: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


def test_public_names_have_docstrings() -> None:
    missing = [
        f"{file.name}:{node.lineno} {node.name}"
        for file in (ROOT / "sglang_ext").rglob("*.py")
        for node in _public(ast.parse(file.read_text()).body)
        if ast.get_docstring(node) is None
    ]
    assert not missing, missing
