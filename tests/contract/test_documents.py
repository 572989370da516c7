"""What the documents name is there: commands, files, links."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = ("docs", "kernels", "launch", "sglang_ext", "tests")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "patches").glob("*.md"),
        *(page for name in OURS for page in (ROOT / name).rglob("*.md")),
    ]
)
TEXTS = [
    *PAGES,
    ROOT / "Makefile",
    *(file for name in OURS for file in (ROOT / name).rglob("*.py")),
]
COMMAND = re.compile(r"python -m ((?:launch|sglang_ext|tests)(?:\.\w+)*)")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(OURS)})/[\w./-]*\w")
MOST_README_LINES = 120
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
SECTION = re.compile(r"\]\(([^)#:]*)#([^)]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def found(pattern: re.Pattern[str], files: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, match) of a pattern."""
    for file in files:
        for match in pattern.findall(file.read_text()):
            yield file, match


@functools.cache
def is_command(module: str) -> bool:
    """Whether ``python -m`` runs it."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    return spec is not None and "__main__" in Path(spec.origin or "").read_text()


def test_commands_are_modules_that_run() -> None:
    commands = list(found(COMMAND, TEXTS))
    assert len({module for _, module in commands}) > 15
    wrong = {
        f"{file.relative_to(ROOT)}: {module}" for file, module in commands if not is_command(module)
    }
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_of_a_page_exist(page: Path) -> None:
    missing = {name for _, name in found(FILE, [page]) if not (ROOT / name).exists()}
    missing |= {link for _, link in found(LINK, [page]) if not (page.parent / link).exists()}
    assert not missing, missing


def sections(page: Path) -> set[str]:
    """Names by which headings are linked to: small letters, dashes for spaces, nothing else."""
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sections_that_are_linked_to_exist(page: Path) -> None:
    missing = [
        f"{file}#{name}"
        for file, name in SECTION.findall(page.read_text())
        if name not in sections(page.parent / file if file else page)
    ]
    assert not missing, missing


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_figures_name_no_place_of_the_machine_they_come_from() -> None:
    for file in (ROOT / "docs" / "benchmarks" / "data").glob("*.json"):
        assert not re.findall(r'"/[^"]*/[^"]*"', file.read_text()), file.name


# ---- names -------------------------------------------------------------------------------

NAME_IN_FILE = re.compile(r"`(\w+)` in `([\w/]+\.py)`")


def test_names_that_a_document_puts_in_a_file_are_there() -> None:
    """In lines as they are wrapped, and of files that are there."""
    named = [
        (document.name, *found)
        for document in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
        for found in NAME_IN_FILE.findall(" ".join(document.read_text().split()))
    ]
    assert len(named) > 10
    missing = [(where, name, file) for where, name, file in named if not holds(file, name)]
    assert not missing, missing


def holds(end: str, name: str) -> bool:
    """Whether a file of the project whose path ends so has a name."""
    files = (file for top in OURS for file in (ROOT / top).rglob(Path(end).name))
    return any(
        file.as_posix().endswith(f"/{end}") and re.search(rf"\b{name}\b", file.read_text())
        for file in files
    )


def test_architecture_has_all_files_of_the_adapter() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = {file.name for file in (ROOT / "sglang_ext" / "adapter").glob("[a-z]*.py")}
    assert not {name for name in files if f"`{name}`" not in text}
