"""A wheel and an sdist carry what lies at the top of the repository and is linked into the
package, and so does the wheel that the image is built with."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.conftest import ROOT

BUILD = "from setuptools import build_meta as b; b.build_sdist('{0}'); b.build_wheel('{0}')"
LINKED = {
    "sglang_ext/patches/series": "patches",
    "sglang_ext/planning/presets": "launch/presets",
    "sglang_ext/kernels/page_copy": "kernels/page_copy",
}
"""Folders of the package, and what they are."""


def build(project: Path, target: Path) -> tuple[Path, Path]:
    """(wheel, sdist) of a project, unpacked below a folder."""
    target.mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(target)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    (wheel,) = target.glob("*.whl")
    (sdist,) = target.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(target / "sdist", filter="data")
    (unpacked,) = (target / "sdist").iterdir()
    return target / "wheel", unpacked


def files(folder: Path) -> dict[str, bytes]:
    """By name, without what was compiled."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "__pycache__" not in name}


def test_what_is_linked_is_in_the_wheel_and_the_sdist(tmp_path: Path) -> None:
    project = tmp_path / "project"
    aside = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, project, symlinks=True, ignore=aside)
    for tree in build(project, tmp_path / "built"):
        for place, source in LINKED.items():
            carried, there = files(tree / place), files(ROOT / source)
            assert carried == {name: there[name] for name in carried}, place
            wanted = {name for name in there if not name.startswith(".")}
            assert carried.keys() == wanted, place


def test_the_image_is_built_with_the_same_wheel(tmp_path: Path) -> None:
    """From no more than what its Dockerfile copies and its context holds."""
    recipe = (ROOT / "launch" / "deploy" / "Dockerfile").read_text()
    context = (ROOT / "launch" / "deploy" / "Dockerfile.dockerignore").read_text().split()
    image = tmp_path / "image"
    image.mkdir()
    for line in re.findall(r"^COPY ([^-].*)$", recipe, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            assert f"!{source}" in context, "not in the context"
            place = image / target / (source if target == "./" else "")
            aside = shutil.ignore_patterns("__pycache__")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, symlinks=True, ignore=aside)
            else:
                shutil.copy(ROOT / source, place)
    whole, _ = build(image, tmp_path / "built")
    package = files(ROOT / "sglang_ext")
    for place, source in LINKED.items():
        folder = place.removeprefix("sglang_ext/")
        package |= {f"{folder}/{name}": text for name, text in files(ROOT / source).items()}
    assert files(whole / "sglang_ext") == package
