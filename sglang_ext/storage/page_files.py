"""Pages in files: one page, one file, whole or not there.

A file is written beside its place and renamed into it, so whoever opens it sees all of it, also
when its writer was killed. It says what it is (format, identity, name, length) and ends with
nothing missing: the checksum over the payload is compared on every read. A file that is torn,
flipped, truncated or foreign is removed and counted; the page is computed again.

Several processes may use one directory. fsync is off unless asked for: what a power failure
takes is found by the checksum and is only a cache.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

from sglang_ext.storage.file_eviction import TEMPORARY, Eviction

Buffer = memoryview

_HEADER = struct.Struct("<4sHxxQ16s16s16x")
"""Magic, version, payload bytes, what it is, checksum of the payload: 64 bytes."""
_MAGIC, _VERSION = b"SGXP", 1
_MOST_REMEMBERED = 1 << 20
_TOUCH_AFTER_S = 60.0
"""A file that was read is noted as used not more often than that."""


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
        root: the directory; made if it is not there.
        identity: whose pages they are. Files of another identity are foreign.
        eviction: bounds what the directory holds.
        fsync: write every file through to the disk before it gets its name.
    """

    def __init__(
        self, root: Path, identity: bytes, eviction: Eviction, *, fsync: bool = False
    ) -> None:
        self.counters = FileCounters()
        self._root = root
        self._identity = identity
        self._eviction = eviction
        self._fsync = fsync
        self._numbers = itertools.count()
        self._used: dict[str, float] = {}
        root.mkdir(parents=True, exist_ok=True)
        for number in range(256):
            (root / f"{number:02x}").mkdir(exist_ok=True)
        eviction.start(root)

    @property
    def removed(self) -> int:
        """Files that were removed to keep the bound."""
        return self._eviction.removed

    def path(self, name: str) -> Path:
        """Where a page is; ``name`` begins with two hexadecimal digits."""
        return self._root / name[:2] / name

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name, whatever is in it."""
        return self.path(name).exists()

    def read(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Fill the buffers with a page; False if it is not there as it was written."""
        path = self.path(name)
        header = bytearray(_HEADER.size)
        size = sum(len(buffer) for buffer in buffers)
        try:
            with path.open("rb", buffering=0) as file:
                read = os.readv(file.fileno(), [header, *buffers])
                whole = read == _HEADER.size + size and os.fstat(file.fileno()).st_size == read
        except FileNotFoundError:
            self.counters.missing += 1
            return False
        except OSError:
            self.counters.failed += 1
            return False
        expected = _HEADER.pack(_MAGIC, _VERSION, size, self._what(name), _checksum(buffers))
        if whole and bytes(header) == expected:
            self.use([name])
            return True
        if bytes(header[:6]) == expected[:6] and header[16:32] != expected[16:32]:
            self.counters.foreign += 1
        else:
            self.counters.damaged += 1
        path.unlink(missing_ok=True)
        return False

    def write(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Keep a page; False if there is no room or the disk fails."""
        path = self.path(name)
        if path.exists():
            self.use([name])
            return True
        size = sum(len(buffer) for buffer in buffers)
        header = _HEADER.pack(_MAGIC, _VERSION, size, self._what(name), _checksum(buffers))
        size += len(header)
        if not self._eviction.make_room(size):
            self.counters.full += 1
            return False
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{next(self._numbers)}")
        try:
            self._write_whole(temporary, [memoryview(header), *buffers], size)
            temporary.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.counters.full += 1
                self._eviction.disk_is_full()
            else:
                self.counters.failed += 1
            return False
        self._eviction.wrote(size)
        return True

    def use(self, names: Sequence[str]) -> None:
        """Note that pages are used: the last ones to be dropped."""
        now = time.time()
        for name in names:
            if now - self._used.get(name, 0.0) > _TOUCH_AFTER_S:
                with contextlib.suppress(OSError):
                    os.utime(self.path(name))
                self._used[name] = now
        if len(self._used) > _MOST_REMEMBERED:
            self._used.clear()

    def clear(self) -> None:
        """Remove every page."""
        for directory in self._root.iterdir():
            if directory.is_dir():
                for path in directory.iterdir():
                    path.unlink(missing_ok=True)
        self._used.clear()
        self._eviction.start(self._root)

    def remove(self) -> None:
        """Remove the directory with all that is in it; the one above it as well, if it is empty
        then."""
        shutil.rmtree(self._root, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._root.parent.rmdir()

    def _write_whole(self, path: Path, buffers: list[Buffer], size: int) -> None:
        with path.open("xb", buffering=0) as file:
            written = os.writev(file.fileno(), buffers)
            if written < size:
                # a short write: what is left, piece by piece
                rest = b"".join(buffers)[written:]
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
            if self._fsync:
                os.fsync(file.fileno())

    def _what(self, name: str) -> bytes:
        return xxhash.xxh3_128_digest(self._identity + name.encode())


def _checksum(buffers: Sequence[Buffer]) -> bytes:
    checksum = xxhash.xxh3_128()
    for buffer in buffers:
        checksum.update(buffer)
    return checksum.digest()
