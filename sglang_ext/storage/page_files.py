"""Pages in files: one page, one file, whole or not there.

A file is written beside its place and renamed into it, so whoever opens it sees all of it, also
when its writer was killed. It says what it is (format, identity, name, length) and ends with
nothing missing: the checksum over the payload is compared on every read. A file that is torn,
flipped, truncated or foreign is removed and counted; the page is computed again.

A file that cannot be read is not there either: it is removed, and if even that fails, not asked
for any more. A directory that somebody removes is made again.

Several processes may use one directory. fsync is off unless asked for: what a power failure
takes is found by the checksum and is only a cache.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import stat
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

from sglang_ext.storage.file_eviction import Eviction
from sglang_ext.storage.page_directories import TEMPORARY, make_directories, page_directories

Buffer = memoryview

_HEADER = struct.Struct("<4sHxxQ16s16s16x")
"""Magic, version, payload bytes, what it is, checksum of the payload: 64 bytes."""
_MAGIC, _VERSION = b"SGXP", 1
_PIECE_BYTES = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST_REMEMBERED = 1 << 20
_TOUCH_AFTER_NS = 60 * 10**9
"""A file that was read is noted as used not more often than that."""
_STEP_NS = 1000
"""Between the last uses of two pages of a path: nobody uses two paths in so short a time."""


@dataclasses.dataclass(slots=True)
class FileCounters:
    """What has happened to files."""

    missing: int = 0
    damaged: int = 0
    foreign: int = 0
    full: int = 0
    failed: int = 0


class PageFiles:
    """Named pages below a directory.

    Args:
        root: the directory of a rank; made if it is not there.
        identity: whose pages they are. Files of another identity are foreign.
        eviction: bounds what the directory holds.
        fsync: write every file through to the disk before it gets its name.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(
        self, root: Path, identity: bytes, eviction: Eviction, *, fsync: bool = False
    ) -> None:
        self.counters = FileCounters()
        self._root = root
        self._identity = identity
        self._eviction = eviction
        self._fsync = fsync
        # processes in two containers may have one number, and share a directory
        self._writer = os.urandom(8).hex()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stamps: dict[str, int] = {}
        self._unreadable: set[str] = set()
        make_directories(root)
        self._try_to_write()
        eviction.start(root)

    def _try_to_write(self) -> None:
        """Pages that never come would be noticed by nobody."""
        probe = self.temporary(self.path("ff"))
        try:
            probe.write_bytes(b"")
        except OSError as error:
            # a full disk is no reason not to start
            if error.errno not in _FULL:
                raise
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    @property
    def removed(self) -> int:
        """Files that were removed to keep the bound."""
        return self._eviction.removed

    def path(self, name: str) -> Path:
        """Where a page is; ``name`` begins with two hexadecimal digits."""
        return self._root / name[:2] / name

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name, whatever is in it."""
        return self._found(name) is not None

    def _found(self, name: str) -> os.stat_result | None:
        if name in self._unreadable:
            return None
        try:
            found = os.stat(f"{self._root}/{name[:2]}/{name}")  # noqa: PTH116 - half the time
        except OSError:
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Fill the buffers with a page; False if it is not there as it was written."""
        path = self.path(name)
        header = bytearray(_HEADER.size)
        size = sum(len(buffer) for buffer in buffers)
        try:
            # a pipe in its place must not hold up anybody
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                read = os.readv(file, [header, *buffers])
                found = os.fstat(file)
            finally:
                os.close(file)
        except FileNotFoundError:
            self.counters.missing += 1
            return False
        except OSError:
            self.counters.failed += 1
            self._remove(name)
            return False
        expected = _HEADER.pack(_MAGIC, _VERSION, size, self._what(name), _checksum(buffers))
        if read == found.st_size == _HEADER.size + size and bytes(header) == expected:
            self._touch(path, found)
            return True
        if bytes(header[:6]) == expected[:6] and header[16:32] != expected[16:32]:
            self.counters.foreign += 1
        else:
            self.counters.damaged += 1
        self._remove(name)
        return False

    def write(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Keep a page; False if there is no room or the disk fails."""
        path = self.path(name)
        stamp = self._stamps.pop(name, 0)
        if (found := self._found(name)) is not None:
            self._touch(path, found)
            return True
        stamp = stamp or time.time_ns()
        size = sum(len(buffer) for buffer in buffers)
        header = _HEADER.pack(_MAGIC, _VERSION, size, self._what(name), _checksum(buffers))
        size += len(header)
        if not self._eviction.make_room(size, stamp):
            self.counters.full += 1
            return False
        try:
            self._write_in_place(name, [memoryview(header), *buffers], stamp)
        except OSError as error:
            if error.errno in _FULL:
                self.counters.full += 1
                self._eviction.disk_is_full(stamp)
            else:
                self.counters.failed += 1
            return False
        self._unreadable.discard(name)
        self._eviction.wrote(size)
        return True

    def use(self, names: Sequence[str]) -> None:
        """Note that the pages of a path are used, and will be written next where they are not
        there. Of pages that are used together those at the end go first: what is left of a path
        is its beginning.

        Args:
            names: from the beginning of the path on.
        """
        with self._lock:
            now = time.time_ns()
            for number, name in enumerate(names):
                stamp = now - number * _STEP_NS
                try:
                    os.utime(f"{self._root}/{name[:2]}/{name}", ns=(stamp, stamp))
                except OSError:
                    self._stamps[name] = stamp
            if len(self._stamps) > _MOST_REMEMBERED:
                self._stamps.clear()

    def clear(self) -> None:
        """Remove every page.

        Raises:
            OSError: one of them cannot be removed; the others are.
        """
        problems: list[OSError] = []
        for directory in page_directories(self._root):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with os.scandir(directory) as entries:
                    for entry in entries:
                        _remove_any(Path(entry.path))
            except OSError as error:
                problems.append(error)
        self._stamps.clear()
        self._unreadable.clear()
        self._eviction.start(self._root)
        if problems:
            raise problems[0]

    def remove(self) -> None:
        """Remove the directory with all that is in it; the one above it as well, if it is empty
        then."""
        shutil.rmtree(self._root, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._root.parent.rmdir()

    def _remove(self, name: str) -> None:
        try:
            _remove_any(self.path(name))
        except OSError:
            if len(self._unreadable) > _MOST_REMEMBERED:
                self._unreadable.clear()
            self._unreadable.add(name)

    @staticmethod
    def _touch(path: Path, found: os.stat_result) -> None:
        """A page was read, or written again."""
        if time.time_ns() - found.st_mtime_ns > _TOUCH_AFTER_NS:
            with contextlib.suppress(OSError):
                os.utime(path)

    def temporary(self, path: Path) -> Path:
        """Where a page is written before it gets its place; nobody else writes there."""
        return path.with_name(f"{TEMPORARY}{self._writer}-{next(self._numbers)}")

    def _write_in_place(self, name: str, buffers: list[Buffer], stamp: int) -> None:
        path = self.path(name)
        temporary = self.temporary(path)
        try:
            try:
                self._write_whole(temporary, buffers, stamp)
            except FileNotFoundError:
                # somebody has removed the directory
                make_directories(self._root)
                self._write_whole(temporary, buffers, stamp)
            try:
                temporary.rename(path)
            except IsADirectoryError:
                self._remove(name)
                temporary.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _write_whole(self, path: Path, buffers: list[Buffer], stamp: int) -> None:
        with path.open("xb", buffering=0) as file:
            written = os.writev(file.fileno(), buffers)
            if written < sum(len(buffer) for buffer in buffers):
                # a short write: what is left, piece by piece
                rest = b"".join(buffers)[written:]
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
            os.utime(file.fileno(), ns=(stamp, stamp))
            if self._fsync:
                os.fsync(file.fileno())

    def _what(self, name: str) -> bytes:
        return xxhash.xxh3_128_digest(self._identity + name.encode())


def problem_of(path: Path) -> str | None:
    """Why a file is not a page as it was written, or None. Whose page it is cannot be told here.

    Raises:
        OSError: it cannot be read.
    """
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return "shorter than a header"
        magic, version, size, _, expected = _HEADER.unpack(header)
        if magic != _MAGIC:
            return "not a page"
        if version != _VERSION:
            return f"of format {version}, not {_VERSION}"
        length = 0
        while piece := file.read(_PIECE_BYTES):
            checksum.update(piece)
            length += len(piece)
    if length != size:
        return f"{length} bytes instead of {size}"
    return None if checksum.digest() == expected else "damaged: another checksum"


def _remove_any(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checksum(buffers: Sequence[Buffer]) -> bytes:
    checksum = xxhash.xxh3_128()
    for buffer in buffers:
        checksum.update(buffer)
    return checksum.digest()
