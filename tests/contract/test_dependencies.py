"""What the packages declare is what they import, and what was tested."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sglang_ext
from sglang_ext.adapter.engine_contract import ENGINE_VERSION
from tests.conftest import ROOT

OURS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLATFORM = tomllib.loads((ROOT / "launch" / "platform" / "pyproject.toml").read_text())["project"]
WITH_SGLANG = {"fastapi", "huggingface-hub", "prometheus-client", "sglang", "torch", "triton"}
"""SGLang and what comes with it; only the adapter and GPU code need it."""
PACKAGES = {"ours": OURS, "platform": PLATFORM}


def pins() -> dict[str, Version]:
    """What was tested, by name."""
    lines = [
        line.split("==")
        for file in (ROOT / "launch" / "requirements").glob("*.txt")
        for line in file.read_text().splitlines()
        if "==" in line
    ]
    return {canonicalize_name(name): Version(version) for name, version in lines}


def declared(project: dict) -> list[Requirement]:
    """Dependencies and extras, without the engine."""
    extras = [one for some in project["optional-dependencies"].values() for one in some]
    requirements = [Requirement(text) for text in [*project["dependencies"], *extras]]
    return [one for one in requirements if one.name != "sglang"]


@pytest.mark.parametrize("name", PACKAGES)
def test_bounds_begin_with_what_was_tested(name: str) -> None:
    tested = pins()
    for requirement in declared(PACKAGES[name]):
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        (lower,) = [s.version for s in requirement.specifier if s.operator == ">="]
        assert lower == f"{version.major}.{version.minor}", requirement
        assert any(s.operator == "<" for s in requirement.specifier), requirement


def test_the_engine_is_the_same_everywhere() -> None:
    made = re.search(r"^ENGINE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made is not None
    assert made[1] == ENGINE_VERSION
    for project in PACKAGES.values():
        assert project["optional-dependencies"]["sglang"] == [f"sglang=={ENGINE_VERSION}"]
    assert PLATFORM["version"] == sglang_ext.__version__


def imported(*folders: Path) -> set[str]:
    """Distributions of others that the files below some folders import."""
    names: set[str] = set()
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    names -= {*sys.stdlib_module_names, "sglang_ext", "sglang_ext_cpu"}
    known = packages_distributions()
    return {canonicalize_name(known[name][0]) if name in known else name for name in names}


def test_what_the_package_imports_is_declared() -> None:
    names = {canonicalize_name(one.name) for one in declared(OURS)}
    assert imported(ROOT / "sglang_ext", ROOT / "kernels") <= names | WITH_SGLANG


def test_what_the_platform_imports_is_declared() -> None:
    names = {canonicalize_name(one.name) for one in declared(PLATFORM)}
    assert imported(ROOT / "launch" / "platform") <= names | {"sglang"}


def needed_by(*names: str) -> set[str]:
    """What distributions that are installed here require, extras left out."""
    found: set[str] = set()
    for name in names:
        requirements = [Requirement(text) for text in requires(name) or ()]
        found |= {canonicalize_name(r.name) for r in requirements if r.marker is None}
    return found


def test_what_the_package_needs_comes_with_the_engine() -> None:
    """So an image of the engine needs nothing but the wheel."""
    direct = needed_by("sglang")
    below = needed_by(*(name for name in ("numba", "openai") if name in direct))
    names = {canonicalize_name(Requirement(text).name) for text in OURS["dependencies"]}
    assert names <= direct | below
    assert not names <= direct, "then nothing has to be looked for below"
