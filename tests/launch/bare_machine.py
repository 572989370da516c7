"""An interpreter that has what a GPU machine has and what ``gpu_setup.sh`` brings, and nothing
else of what is installed here."""

import importlib.metadata
import re
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "launch" / "requirements" / "gpu.txt"
THERE = "# there: "
"""Begins a line of the list that names what the machine has."""
OWN = ("sglang-ext", "sglang-ext-cpu")
"""Whose entry points come along; their code is that of the repository."""


def carried() -> list[str]:
    """Distributions that are brought."""
    lines = LIST.read_text().splitlines()
    return [line.partition("==")[0] for line in lines if line and not line.startswith("#")]


def there() -> set[str]:
    """Distributions that the machine has: those that the list names, and what these need."""
    found: set[str] = set()
    lines = LIST.read_text().splitlines()
    names = [
        name
        for line in lines
        if line.startswith(THERE)
        for name in line.removeprefix(THERE).split()
    ]
    while names:
        name = _canonical(names.pop())
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                names.append(needed.name)
    return found


def make(folder: Path) -> tuple[Path, dict[str, str]]:
    """Build it.

    Returns:
        The interpreter, and the variables that it needs: the same two that ``install`` prints.
    """
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    site = folder / "site"
    site.mkdir()
    for name in (*carried(), *there()):
        _link(_tops(name), site)
    for name in OWN:
        _link({top for top in _tops(name) if top.suffix == ".dist-info"}, site)
    path = f"{ROOT}:{ROOT / 'launch' / 'platform'}:{site}"
    return folder / "bare" / "bin" / "python", {"PYTHONPATH": path}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _tops(name: str) -> set[Path]:
    """What a distribution has in the folder of all."""
    distribution = importlib.metadata.distribution(name)
    files = distribution.files or []
    names = {file.parts[0] for file in files} - {"..", "__pycache__", "share"}
    return {Path(str(distribution.locate_file(top))) for top in names}


def _link(tops: Iterable[Path], site: Path) -> None:
    for top in tops:
        link = site / top.name
        if not link.exists():
            link.symlink_to(top)


if __name__ == "__main__":
    interpreter, variables = make(Path(sys.argv[1]))
    print(*(f"{name}={value}" for name, value in variables.items()), interpreter)
