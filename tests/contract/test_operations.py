"""docs/operations.md speaks of every route of the engine, and names tests that exist."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
ROUTES, SCHEDULER = TEXT.split("\n## Scheduler options\n")
TABLES, UNTOUCHED = ROUTES.split("\n## Routes that touch neither\n")
TESTS = "tests/e2e/test_operations.py"
DECORATORS = {"get", "post", "put", "delete", "patch", "head", "api_route", "websocket"}


def engine_routes() -> set[str]:
    """Routes of the engine's HTTP server, as its decorators say."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "srt" / "entrypoints"
    server = (folder / "http_server.py").read_text()
    included = re.findall(r"from sglang\.srt\.entrypoints\.(\w+) import router", server)
    assert len(included) == server.count("app.include_router("), "a router from elsewhere"
    sources = [server, *((folder / f"{name}.py").read_text() for name in included)]
    return {route for source in sources for route in _routes(ast.parse(source))}


def _routes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for call in getattr(node, "decorator_list", ()):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in DECORATORS
            ):
                yield _path(call.args[0])


def _path(argument: ast.expr) -> str:
    if isinstance(argument, ast.Call):  # os.environ.get(name, path)
        argument = argument.args[1]
    if isinstance(argument, ast.Name):  # the root under another name
        return "/"
    assert isinstance(argument, ast.Constant)
    return str(argument.value)


def rows() -> list[list[str]]:
    """Cells of the tables of routes, without their heads."""
    lines = [line for line in TABLES.splitlines() if line.startswith("| `/")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def routes_of(text: str) -> list[str]:
    """Routes named in a text."""
    return re.findall(r"`(/[^` ]*)`", text)


def test_every_route_is_in_a_table_or_touches_nothing() -> None:
    named = [route for row in rows() for route in routes_of(row[0])] + routes_of(UNTOUCHED)
    assert len(named) == len(set(named)), "a route is named twice"
    assert set(named) == engine_routes()


def test_every_row_names_tests_that_exist() -> None:
    for row in rows():
        assert len(row) == 3, row
        named = re.findall(r"`(?:(tests/[^`:]+)::)?(test_\w+)`", row[2])
        assert named or row[2] == "the same", row
        for file, name in named:
            assert f"def {name}(" in (ROOT / (file or TESTS)).read_text(), f"{file}::{name}"
