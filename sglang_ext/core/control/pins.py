"""Pins: prefixes that stay on the host until somebody says otherwise, or everything is flushed."""

from typing import NamedTuple

import numpy as np

from sglang_ext.core.host.quotas import Quotas
from sglang_ext.core.host.room import NEEDED_NOW
from sglang_ext.core.moves.backups import Backups
from sglang_ext.core.plan import Declined, Transfer
from sglang_ext.core.residency import Residency
from sglang_ext.core.storage.plan import Held
from sglang_ext.core.table.columns import Rows

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class _Pin(NamedTuple):
    """A path that ends where a request can resume.

    Attributes:
        asked: whole pages of the prompt that was to be pinned, which may go on from there.
        path: all of it.
        window: its last window.
    """

    asked: int
    path: Held
    window: Held


class Pins:
    """Prefixes of which all pages and the last window stay on the host.

    A pin is a lock on host copies, as a transfer has it, so whatever makes room passes them by.
    It may be taken before there is a copy: it protects that from the moment it appears. On the
    device pinned pages go as others do.

    Args:
        share: of the host that pins may take, from 0 to 1.

    Attributes:
        rows: pinned pages, each once, rising.
    """

    def __init__(
        self, residency: Residency, backups: Backups, quotas: Quotas, share: float
    ) -> None:
        table = residency.table
        self._residency = residency
        self._table = table
        self._backups = backups
        self._quotas = quotas
        self._share = share
        # nothing is on the host yet
        self._whole = residency.host.free_pages, residency.host_window.free_pages
        self._pins: dict[int, _Pin] = {}
        self.rows = self._windows = _NO_ROWS

    @property
    def ends(self) -> list[int]:
        """Rows with which pinned prefixes end."""
        return list(self._pins)

    def fits(self, path: Rows) -> bool:
        """Whether pins may take what a path needs beside what they have."""
        if min(self._whole) == 0:
            return False
        taken = len(np.union1d(self.rows, path))
        windows = len(np.union1d(self._windows, self._residency.window_of(path)))
        # both components may share a memory: what one takes is not the other's
        return taken / self._whole[0] + windows / self._whole[1] <= self._share

    def is_within_quota(self, path: Rows) -> bool:
        """Whether what is pinned of the namespace of a path would be within its quota with it."""
        bound = self._quotas.bounds.get(self._table.namespace(path))
        if bound is None:
            return True
        space = self._table.space
        taken, windows = (
            len(np.union1d(pinned[space[pinned] == space[path[0]]], added))
            for pinned, added in (
                (self.rows, path),
                (self._windows, self._residency.window_of(path)),
            )
        )
        return self._quotas.bytes_of(taken, windows) <= bound

    def add(self, path: Rows, asked: int) -> None:
        """Pin a path that ends where a request can resume; again is no harm.

        Args:
            asked: whole pages of the prompt that this is of.
        """
        end = int(path[-1])
        if end in self._pins:
            self.remove(end)
        table = self._table
        pin = _Pin(asked, self._held(path), self._held(self._residency.window_of(path)))
        self._pins[end] = pin
        table.host.lock(path)
        table.swa_host.lock(pin.window.rows)
        # so it is copied as one that is worth keeping
        table.resume[end] = True
        self._residency.candidates.keep_tail(end, kept=True)
        self._note()

    def copy(self, end: int) -> Transfer | Declined | None:
        """Begin to copy what is missing of a pinned path; None: nothing can be copied."""
        path = self._pins[end].path.rows
        return self._backups.begin(path, make_room=True, claim=NEEDED_NOW)

    def is_there(self, end: int) -> bool:
        """Whether all pages of a pinned path are still in the table; what has no copy on the host
        yet may leave the device."""
        path = self._pins[end].path
        return bool((self._table.generation[path.rows] == path.generations).all())

    def is_whole(self, end: int) -> bool:
        """Whether all that is pinned is on the host."""
        path = self._pins[end].path.rows
        ready = bool(self._table.host.ready[path].all())
        return ready and bool(self._residency.kept.ends[end])

    def of(self, path: Rows, asked: int) -> int | None:
        """The end of the pin that a prompt has, whose pages in the table are ``path``."""
        for end in reversed(path.tolist()):
            pin = self._pins.get(end)
            if pin is not None and pin.asked == asked:
                return int(end)
        return None

    def remove(self, end: int) -> None:
        """Pin a prefix no longer; what becomes of it is as if it had never been."""
        pin = self._pins.pop(end)
        table = self._table
        window = self._still_there(pin.window)
        table.host.unlock(self._still_there(pin.path))
        table.swa_host.unlock(window)
        self._residency.candidates.keep_tail(end, kept=False)
        self._residency.drop_unneeded(window)
        self._note()

    def forget(self, rows: Rows) -> None:
        """Remove the pins that end with some of ``rows``, which are about to go."""
        for end in np.intersect1d(rows, self.ends).tolist():
            self.remove(int(end))

    def locks(self) -> tuple[Rows, Rows]:
        """Rows whose host pages are locked by pins, and those of windows; once for each pin."""
        pins = self._pins.values()
        full = [self._still_there(pin.path) for pin in pins]
        window = [self._still_there(pin.window) for pin in pins]
        return np.concatenate((_NO_ROWS, *full)), np.concatenate((_NO_ROWS, *window))

    def _held(self, rows: Rows) -> Held:
        return Held(rows, self._table.generation[rows])

    def _still_there(self, held: Held) -> Rows:
        rows: Rows = held.rows[self._table.generation[held.rows] == held.generations]
        return rows

    def _note(self) -> None:
        pins = self._pins.values()
        self.rows = np.unique(np.concatenate((_NO_ROWS, *(pin.path.rows for pin in pins))))
        self._residency.kept.pin(self._windows, pinned=False)
        self._windows = np.unique(np.concatenate((_NO_ROWS, *(pin.window.rows for pin in pins))))
        self._residency.kept.pin(self._windows, pinned=True)
