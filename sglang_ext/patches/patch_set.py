"""The patches, and what they do to a tree of the engine: all or nothing."""

import contextlib
import dataclasses
import importlib.resources
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_ext.adapter.engine_contract import ENGINE_VERSION
from sglang_ext.patches.unified import DiffError, FileDiff, content_hash, parse

_VERSION = re.compile(r"""^__version__\b.*=\s*['"]([^'"]+)['"]""", re.MULTILINE)


class PatchError(Exception):
    """Nothing is written, for a reason that is one line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Patch:
    """One file of the series.

    Attributes:
        subject: what it does, in one line.
    """

    name: str
    subject: str
    files: tuple[FileDiff, ...]

    def is_applied(self, root: Path) -> bool:
        """Whether a tree has it, or could have it.

        Raises:
            PatchError: neither.
        """
        applied = {_is_applied(file, root) for file in self.files}
        if len(applied) > 1:
            raise PatchError(f"{self.name} is applied to some of its files only")
        return applied.pop()


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A file and what is to be in it."""

    path: Path
    contents: bytes


def series() -> list[Patch]:
    """All patches, in their order."""
    folder = importlib.resources.files(__package__) / "series"
    diffs = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".diff")), key=str)
    return [_patch(diff.name.removesuffix(".diff"), diff.read_bytes()) for diff in diffs]


def _patch(name: str, diff: bytes) -> Patch:
    return Patch(name, diff.partition(b"\n")[0].decode(), parse(diff))


def refuse_other_versions(root: Path) -> None:
    """Check that a folder holds the engine that the patches were made for.

    Raises:
        PatchError: it does not.
    """
    file = root / "sglang" / "_version.py"
    try:
        found = _VERSION.search(file.read_text())
    except (OSError, UnicodeDecodeError):
        raise PatchError(f"no version of sglang can be read in {file}") from None
    version = "an unknown version" if found is None else found[1]
    if version != ENGINE_VERSION:
        raise PatchError(f"the patches are for sglang {ENGINE_VERSION}; {root} has {version}")


def plan(patches: Iterable[Patch], root: Path, *, revert: bool = False) -> list[Change]:
    """What has to be written so that a tree has the patches, or has them no more.

    Raises:
        PatchError: a file is not one that a patch knows.
    """
    changes = []
    for patch in patches:
        if patch.is_applied(root) is not revert:
            continue
        for file in patch.files:
            path = root / file.path
            diff = file.reversed() if revert else file
            try:
                changes.append(Change(path, diff.apply(_read(path))))
            except DiffError as error:
                raise PatchError(f"{patch.name}: {error}") from error
    return changes


def _is_applied(file: FileDiff, root: Path) -> bool:
    path = root / file.path
    found = content_hash(_read(path))
    if found not in (file.before, file.after):
        raise PatchError(f"{path} differs from sglang {ENGINE_VERSION}, patched or not")
    return found == file.after


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PatchError(f"{path} cannot be read: {error.strerror}") from error


def write(changes: list[Change]) -> None:
    """Write all files or none. A file is replaced, never written into: other environments may
    share it by a hard link.

    Raises:
        PatchError: a file could not be written; those before it are as they were.
    """
    with contextlib.ExitStack() as stack:
        try:
            new = [stack.enter_context(_beside(change.path, change.contents)) for change in changes]
            old = [stack.enter_context(_beside(c.path, c.path.read_bytes())) for c in changes]
        except OSError as error:
            raise PatchError(f"{error.filename} cannot be written: {error.strerror}") from error
        done = 0
        try:
            for change, file in zip(changes, new, strict=True):
                file.replace(change.path)
                done += 1
        except OSError as error:
            for change, file in zip(changes[:done], old, strict=False):
                file.replace(change.path)
            raise PatchError(f"{error.filename2} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _beside(path: Path, contents: bytes) -> Iterator[Path]:
    """A temporary file beside another, with its mode; removed if it is still there at the end."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    file = Path(name)
    try:
        with os.fdopen(handle, "wb") as output:
            output.write(contents)
        shutil.copymode(path, file)
        yield file
    finally:
        file.unlink(missing_ok=True)
