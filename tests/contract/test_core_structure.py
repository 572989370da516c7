"""The core is objects that own their state, in files that do not import each other in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

CORE = ROOT / "sglang_ext" / "core"
FILES = sorted(CORE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def test_no_class_has_its_implementation_from_another_one() -> None:
    ours = {node.name for tree in TREES.values() for node in ast.walk(tree) if is_class(node)}
    inherited = {
        (node.name, base.id)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if is_class(node)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in ours
    }
    assert inherited == set()


def is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes that are assigned, of whatever object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def test_no_attribute_is_assigned_outside_the_class_that_owns_it() -> None:
    """Counters are written where it happens what they count, and belong to nobody."""
    foreign = [
        f"{file.relative_to(CORE)}:{node.lineno} {ast.unparse(node)}"
        for file, tree in TREES.items()
        for node in assigned(tree)
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
        and not ast.unparse(node.value).endswith("counters")
        and node.attr != "__qualname__"
    ]
    assert foreign == []


def test_files_do_not_import_each_other_in_circles() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    imports = {name: set(imported(TREES[file], modules)) for name, file in modules.items()}
    left = dict(imports)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def imported(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the core that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (name for name in names if name in modules)
