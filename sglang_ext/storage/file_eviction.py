"""How much a directory of pages holds: a bound, and the least recently used files go first.

Files carry their last use as their modification time, so processes that share a directory
agree without talking: each one counts what it has written since it last looked, and who
reaches the bound looks again and removes.
"""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"
"""Names of files that are being written begin like this."""
_ABANDONED_AFTER_S = 600.0
"""A file that has been written for so long belongs to a process that was killed."""
_LOOK_SHARE = 16
"""A process looks again when it has written one in so many bytes of the bound."""
_DOWN_TO = 0.9
_DEFAULT_SHARE = 0.8
"""Of what the filesystem has free at start, if no bound is given."""


class Eviction:
    """Keeps the files below a directory within a bound.

    Attributes:
        removed: files removed.

    Args:
        most_bytes: the bound; None for 80 % of what is free at start, the pages that are there
            included.
        shares: so many directories share it equally.
    """

    def __init__(self, most_bytes: int | None, shares: int = 1) -> None:
        self.removed = 0
        self._shares = shares
        self._asked = most_bytes
        self._lock = threading.Lock()
        self._root = Path()
        self._most = 0
        self._held = 0
        self._unseen = 0

    def start(self, root: Path) -> None:
        """Look at what is there, and remove what others left half written."""
        with self._lock:
            self._root = root
            now = time.time()
            self._held = self._unseen = 0
            for path, stat in self._files(temporary=True):
                if path.name.startswith(TEMPORARY):
                    if now - stat.st_mtime > _ABANDONED_AFTER_S:
                        path.unlink(missing_ok=True)
                else:
                    self._held += stat.st_size
            most = self._asked
            if most is None:
                most = int((shutil.disk_usage(root).free + self._held) * _DEFAULT_SHARE)
            self._most = most // self._shares

    def make_room(self, size: int) -> bool:
        """Whether a file of so many bytes may be written; others are removed for it."""
        with self._lock:
            if size > self._most:
                return False
            over = self._held + self._unseen + size > self._most
            if over or self._unseen > self._most // _LOOK_SHARE:
                self._shrink(int(self._most * _DOWN_TO) - size if over else None)
            return self._held + self._unseen + size <= self._most

    def wrote(self, size: int) -> None:
        """A file was written."""
        with self._lock:
            self._unseen += size

    def disk_is_full(self) -> None:
        """The filesystem has no room: hold less from now on."""
        with self._lock:
            self._shrink(int((self._held + self._unseen) * _DOWN_TO))

    def _shrink(self, target: int | None) -> None:
        """Look, and remove the least recently used files down to so many bytes; None: only if
        there are too many."""
        with _exclusive(self._root) as alone:
            files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
            held = sum(stat.st_size for _, stat in files)
            if target is None:
                target = self._most if held <= self._most else int(self._most * _DOWN_TO)
            for path, stat in files if alone else []:
                if held <= max(0, target):
                    break
                path.unlink(missing_ok=True)
                held -= stat.st_size
                self.removed += 1
        self._held, self._unseen = held, 0

    def _files(self, *, temporary: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
        for directory in os.scandir(self._root):
            if not directory.is_dir():
                continue
            for entry in os.scandir(directory.path):
                if temporary or not entry.name.startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat()


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[bool]:
    """Whether no other process removes files at the moment."""
    with (root / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
