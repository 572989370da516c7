"""Trees of the engine that a test may change."""

import importlib.util
import os
import shutil
from pathlib import Path

from sglang_ext.patches.patch_set import series
from tests.conftest import ROOT

TOUCHED = sorted(file.path for patch in series() for file in patch.files)
"""All files that patches change, below the folder that holds the engine."""


def installed() -> Path:
    """The folder that holds the engine."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]).parent


def copy_touched(root: Path) -> Path:
    """Copies of the files that patches read and change, nothing else."""
    for path in ("sglang/_version.py", *TOUCHED):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(installed() / path, target)
    return root


def copy_engine(root: Path) -> Path:
    """A whole engine: files that patches change are copies, all others are links."""
    copy_touched(root)
    for folder in {parent for path in TOUCHED for parent in Path(path).parents[:-1]}:
        for entry in (installed() / folder).iterdir():
            link = root / folder / entry.name
            if entry.name != "__pycache__" and not link.exists():
                link.symlink_to(entry)
    return root


def python_path(root: Path) -> str:
    """``PYTHONPATH`` with which the engine is this one."""
    return os.pathsep.join(map(str, (root, ROOT, ROOT / "launch" / "platform")))


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
