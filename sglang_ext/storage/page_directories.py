"""Where pages lie below a directory: ``<model>/<rank>-of-<ranks>/<two digits>/<name>``.

A model stands for whatever decides on the bytes of a page, so what an older model or layout
has left lies beside what is in use. Nothing here touches a file that is not named like a page.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

TEMPORARY = ".tmp-"
"""Names of files that are being written begin like this."""
LOCK = ".lock"
"""Names of the files by which processes exclude each other begin like this."""
_RANK = re.compile(r"(\d+)-of-\d+")
_DIGITS = re.compile(r"[0-9a-f]{2}")
_PAGE = re.compile(r"[0-9a-f]{8,64}(\.\w+)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """The part of a directory that one rank looks after: its own pages, and those of every
    other model that a rank of this number has left, modulo ``ranks``.

    So the ranks of a server bound all that is there, and none looks at what another one does.

    Attributes:
        rank, ranks: among those that have a part of each page.
        writers: processes of the server that have the same part (data-parallel ranks). They
            look after the same pages, with the same bound.
    """

    base: Path
    rank: int = 0
    ranks: int = 1
    writers: int = 1

    @property
    def own_rank(self) -> str:
        """Name of this rank's directory, below that of a model."""
        return f"{self.rank}-of-{self.ranks}"

    @property
    def lock(self) -> Path:
        """Held while files are removed."""
        return self.base / f"{LOCK}-{self.own_rank}"

    def directories(self) -> Iterator[Path]:
        """Directories of ranks."""
        for directory in rank_directories(self.base):
            number = _RANK.fullmatch(directory.name)
            if number and int(number[1]) % self.ranks == self.rank:
                yield directory


def rank_directories(base: Path) -> Iterator[Path]:
    """All directories of ranks below ``base``; none if there is no such directory."""
    for model in _entries(base):
        if model.is_dir(follow_symlinks=False):
            for rank in _entries(model):
                if _RANK.fullmatch(rank.name) and rank.is_dir(follow_symlinks=False):
                    yield Path(rank.path)


def page_files(
    directories: Iterable[Path], *, temporary: bool = False
) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of pages below directories of ranks.

    Args:
        temporary: those that are being written, too.
    """
    for directory in directories:
        for digits in _entries(directory):
            if not _DIGITS.fullmatch(digits.name):
                continue
            for entry in _entries(digits):
                begun = temporary and entry.name.startswith(TEMPORARY)
                if entry.is_dir(follow_symlinks=False):
                    continue
                if begun or _PAGE.fullmatch(entry.name):
                    with contextlib.suppress(OSError):  # it has just gone
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def make_directories(directory: Path) -> None:
    """All directories of a rank.

    Raises:
        OSError: they cannot be made.
    """
    there = {entry.name for entry in _entries(directory) if entry.is_dir()}
    for place in page_directories(directory):
        if place.name not in there:
            place.mkdir(parents=True, exist_ok=True)


def page_directories(directory: Path) -> Iterator[Path]:
    """Where the pages of a rank lie, by the two digits with which their names begin."""
    for number in range(256):
        yield directory / f"{number:02x}"


def remove_if_empty(directory: Path) -> bool:
    """Remove a rank's directory if no file is in it, and its model's if that is empty then;
    whether it was removed. A server that uses it makes it again."""
    if next(iter(page_files([directory], temporary=True)), None) is not None:
        return False
    with contextlib.suppress(OSError):  # something else is in it
        for entry in _entries(directory):
            if entry.name.startswith(LOCK):
                Path(entry.path).unlink(missing_ok=True)
            else:
                Path(entry.path).rmdir()
        directory.rmdir()
        directory.parent.rmdir()
    return not directory.exists()


def _entries(directory: "str | Path | os.DirEntry[str]") -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:  # it is gone, or not a directory, or nobody may look
        return []
