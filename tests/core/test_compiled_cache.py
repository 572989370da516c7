"""What is compiled and kept on disk never outlives the sources that it was made of."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_ext
from tests.conftest import HALVES

PACKAGE = Path(sglang_ext.__file__).parent
COMPILED = "sglang_ext.core.compiled"


def _imports(path: Path) -> set[str]:
    """Modules of ours that a file takes names from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


# a search does not follow links
SOURCES = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels" / "page_copy").glob("*.py")]
COMPILED_FILES = [path for path in sorted(SOURCES) if f"{COMPILED}.build" in _imports(path)]


def test_the_files_with_loops_are_found() -> None:
    assert {path.name for path in COMPILED_FILES} >= {"loops.py", "scans.py", "cpu_loops.py"}


@pytest.mark.parametrize("path", COMPILED_FILES, ids=lambda path: path.name)
def test_loops_take_names_from_other_loops_alone(path: Path) -> None:
    """A constant of another file would be compiled in, and stay when that file changes."""
    elsewhere = {name for name in _imports(path) if not name.startswith(COMPILED)}
    assert not elsewhere, f"{path.name} takes names from {elsewhere}"


def _loaded(modules: tuple[str, ...]) -> set[str]:
    """Files of loops that come with some modules."""
    waiting, found = list(modules), set[str]()
    while waiting:
        path = PACKAGE.parent / f"{waiting.pop().replace('.', '/')}.py"
        if path.exists() and path.name not in found:
            found.add(path.name)
            text = path.read_text()
            waiting += re.findall(rf"^from ({COMPILED}\.\w+) import", text, re.MULTILINE)
            for names in re.findall(rf"^from {COMPILED} import (.*)", text, re.MULTILINE):
                waiting += [f"{COMPILED}.{name}" for name in names.split(", ")]
    return found


def test_all_loops_are_compiled_before_workers_begin() -> None:
    """Two processes do it, and the longest ones are not waited for twice."""
    first, second = map(_loaded, HALVES)
    loops = {path.name for path in COMPILED_FILES if "\n@compiled(" in path.read_text()}
    assert first | second >= loops
    assert len(loops) > 15
    assert not first & second & {"loops.py", "candidates.py", "order.py", "cpu_loops.py"}


PART = """
from numba.core.types import int64
from sglang_ext.core.compiled.build import compiled

STEP = 1

@compiled(int64(int64))
def part(value):
    return value + STEP
"""
WHOLE = """
from numba.core.types import int64
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.part import STEP, part

@compiled(int64(int64))
def whole(value):
    return 10 * part(value) + STEP
"""


def test_a_change_in_one_file_of_loops_reaches_the_others(tmp_path: Path) -> None:
    """In a copy of the package: a loop calls one of another file, and uses its constant."""
    folder = tmp_path / "sglang_ext" / "core" / "compiled"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "core/__init__.py", "core/compiled/__init__.py"):
        shutil.copy(PACKAGE / name, tmp_path / "sglang_ext" / name)
    shutil.copy(PACKAGE / "core/compiled/build.py", folder)
    (folder / "whole.py").write_text(WHOLE)

    def run() -> int:
        code = "from sglang_ext.core.compiled.whole import whole; print(whole(0))"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""}
        command = [sys.executable, "-c", code]
        return int(subprocess.check_output(command, env=environment, cwd=tmp_path))

    (folder / "part.py").write_text(PART)
    assert run() == 11
    kept = len(list((folder / "__pycache__").glob("whole.whole*.nbi")))
    assert kept == 1, "nothing was kept on disk: this would find nothing"
    (folder / "part.py").write_text(PART.replace("STEP = 1", "STEP = 2"))
    assert run() == 22
