"""The project's own files keep their promises."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from sglang_ext.kernels import page_copy
from tests.conftest import ROOT

MAX_FILE_LINES = 600
# a search does not follow the link from one to the other
SHIPPED = [file for folder in ("sglang_ext", "kernels") for file in (ROOT / folder).rglob("*.py")]


def test_files_stay_small() -> None:
    for file in SHIPPED:
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
        for file in SHIPPED
        for node in _public(ast.parse(file.read_text()).body)
        if ast.get_docstring(node) is None
    ]
    assert not missing, missing


def test_kernels_are_those_of_this_checkout() -> None:
    """Whatever else is installed: a second checkout runs its own."""
    assert page_copy.__file__ is not None
    assert Path(page_copy.__file__).resolve() == ROOT / "kernels" / "page_copy" / "__init__.py"


def test_the_link_to_the_kernels_stays_a_relative_link() -> None:
    """Another path, or a copy, would mix checkouts."""
    link = ROOT / "sglang_ext" / "kernels" / "page_copy"
    assert link.is_symlink()
    assert str(link.readlink()) == "../../kernels/page_copy"


def test_the_kernels_folder_does_not_shadow_the_package_that_sglang_imports() -> None:
    """SGLang imports ``kernels`` from PyPI. With an ``__init__.py`` it would find this folder
    first; without one, an installed package wins, and where there is none, nothing is loaded."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
