"""A wheel and an sdist carry what lies at the top of the repository and is linked into the
package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.conftest import ROOT

BUILD = "from setuptools import build_meta as b; b.build_sdist('{0}'); b.build_wheel('{0}')"


def test_patches_are_in_the_wheel_and_the_sdist(tmp_path: Path) -> None:
    project = tmp_path / "project"
    aside = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, project, symlinks=True, ignore=aside)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(tmp_path)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    sources = {path.name: path.read_bytes() for path in (ROOT / "patches").iterdir()}
    for tree in (tmp_path / "wheel", unpacked):
        carried = (tree / "sglang_ext" / "patches" / "series").iterdir()
        assert {path.name: path.read_bytes() for path in carried} == sources
