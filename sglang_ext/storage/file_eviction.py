"""How much a directory of pages holds: a bound, and the least recently used files go first.

Files carry their last use as their modification time, so processes that share a directory
agree without talking: each one counts what it has written since it last looked, and who
reaches the bound looks again and removes. That holds for what other models have left there too.

A page displaces only what was used less recently than itself: never the pages in front of it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_ext.storage.page_directories import (
    TEMPORARY,
    Share,
    page_files,
    remove_if_empty,
)

logger = logging.getLogger(__name__)

_ABANDONED_AFTER_S = 600.0
"""A file that has been written for so long belongs to a process that was killed. A directory
without files that is older was left."""
_AHEAD_S = 60.0
"""A file that claims to be used so much later than now was written by a clock that was wrong."""
_LOOK_SHARE = 16
"""The processes that share a part of a directory look again when they have written one in so many
bytes of the bound: each one its part of that, for it does not see what the others write."""
_DOWN_TO = 0.9
_DEFAULT_SHARE = 0.8
"""Of what the filesystem has free, if no bound is given."""
_KEPT_SHARE = 0.5
"""Of what was held, so much is kept when others fill the disk."""


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


class Eviction:
    """Keeps the files of a share of a directory within a bound.

    Attributes:
        removed: files removed.
        most: bytes that may be held.
        held: bytes that were held when somebody looked last.
        others: of these, bytes of other models, found at start.

    Args:
        share: what is bounded.
        most_bytes: the bound over all shares; None for 80 % of the most that was free when
            somebody looked, the pages that are there included.
        free_bytes: what the filesystem of a directory has free.
    """

    def __init__(
        self,
        share: Share,
        most_bytes: int | None = None,
        *,
        free_bytes: Callable[[Path], int] = _free_bytes,
    ) -> None:
        self.removed = 0
        self.most = self.held = self.others = 0
        self._share = share
        self._asked = most_bytes
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self._unseen = 0
        self._peak = 0
        self._refused = 0

    def start(self, own: Path) -> None:
        """Look at what is there, and remove what others left half written or empty.

        Args:
            own: where this process writes.
        """
        with self._lock:
            now = time.time()
            self.held = self.others = self._unseen = 0
            for directory in self._share.directories():
                size = sum(_sizes(directory, now))
                self.held += size
                if directory != own:
                    self.others += size
                    with contextlib.suppress(OSError):
                        if size == 0 and now - directory.stat().st_mtime > _ABANDONED_AFTER_S:
                            remove_if_empty(directory)
            self._peak = self.held
            # what is there stays, also when others have filled the disk meanwhile
            self.most = self.held
            self._choose_bound(self.held)

    def _choose_bound(self, held: int) -> None:
        ranks = self._share.ranks
        if self._asked is None:
            room = self._free_bytes(self._share.base) // ranks
            self.most = max(self.most, int((room + held) * _DEFAULT_SHARE))
        else:
            self.most = self._asked // ranks

    def make_room(self, size: int, stamp: int) -> bool:
        """Whether a file of so many bytes may be written; others are removed for it.

        Args:
            stamp: its last use, in nanoseconds; what is more recent stays.
        """
        with self._lock:
            if size > self.most:
                return False
            over = self.held + self._unseen + size > self.most
            if over:
                self._shrink(lambda _: int(self.most * _DOWN_TO) - size, stamp)
            elif self._unseen > self.most // (_LOOK_SHARE * self._share.writers):
                self._shrink(self._bound, stamp)
            return self.held + self._unseen + size <= self.most

    def _bound(self, held: int) -> int:
        return self.most if held <= self.most else int(self.most * _DOWN_TO)

    def wrote(self, size: int) -> None:
        """A file was written."""
        with self._lock:
            self._unseen += size
            self._peak = max(self._peak, self.held + self._unseen)

    def disk_is_full(self, stamp: int) -> None:
        """The filesystem has no room for a file: less is held, but not less than half of the most
        that was held since the start. Others may take what is given up, and would have all of it
        in the end.

        Args:
            stamp: see ``make_room``.
        """
        with self._lock:
            least = int(min(self._peak, self.most) * _KEPT_SHARE)
            held = self.held + self._unseen
            if held > least:
                self._shrink(lambda held: max(least, int(held * _DOWN_TO)), stamp)
            self._refused += 1
            if self._refused & (self._refused - 1) == 0:  # one line each time it has doubled
                logger.warning(
                    "storage: %s is full, %d pages not written so far; %.2f GB held of at most "
                    "%.2f GB, never less than %.2f GB",
                    self._share.base,
                    self._refused,
                    (self.held + self._unseen) / 1e9,
                    self.most / 1e9,
                    least / 1e9,
                )

    def _shrink(self, target: Callable[[int], int], stamp: int) -> None:
        """Look, and remove the least recently used files until so many bytes are held.

        Args:
            target: bytes to hold, of those that are held.
        """
        with _exclusive(self._share.lock) as alone:
            files = sorted(
                page_files(self._share.directories()), key=lambda entry: entry[1].st_mtime_ns
            )
            held = sum(stat.st_size for _, stat in files)
            self._choose_bound(held)
            most = max(0, target(held))
            for path, stat in files if alone else []:
                if held <= most or stat.st_mtime_ns >= stamp:
                    break
                with contextlib.suppress(OSError):  # somebody else's, who does not let us
                    path.unlink(missing_ok=True)
                    held -= stat.st_size
                    self.removed += 1
        self.held, self._unseen = held, 0


def _sizes(directory: Path, now: float) -> Iterator[int]:
    """Sizes of the pages in a rank's directory; what does not belong there is put right."""
    for path, stat in page_files([directory], temporary=True):
        with contextlib.suppress(OSError):
            if path.name.startswith(TEMPORARY):
                if now - stat.st_mtime > _ABANDONED_AFTER_S:
                    path.unlink(missing_ok=True)
                continue
            if stat.st_mtime > now + _AHEAD_S:
                os.utime(path)
        yield stat.st_size


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[bool]:
    """Whether no other process removes files at the moment. Without a file to lock, as on a
    full disk, two may remove more than one would."""
    try:
        file = lock.open("a")
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
