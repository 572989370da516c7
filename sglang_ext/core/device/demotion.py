"""What to copy to the host ahead of its eviction from the device.

Eviction takes the oldest pages, so the oldest ones must have their copies while there
is still room elsewhere; when their turn comes nobody waits for a copy.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.candidates import Candidates, Kind
from sglang_ext.core.compiled import candidates as loops
from sglang_ext.core.table.columns import Rows, resident_zeros
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.write_policy import WritePolicy, worth_keeping

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_WAIT_SHARE = 3
"""Copies that are used up are made good when they are this part of all: a look and a backup cost
about the same for few pages as for many."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """What a look at the pages that eviction takes next has found.

    Attributes:
        dirty: rows to copy to the host now, oldest first.
        soon: rows to copy a little later, or now with one of ``dirty`` on their path.
        room: pages that can be allocated or locked before it is time to look again.
        room_then: the same if all of ``dirty`` are being copied.
    """

    dirty: Rows
    soon: Rows
    room: int
    room_then: int


class Demotion:
    """Looks at what eviction takes next.

    Attributes:
        end_of: (table rows,) int64, for each page the end of a window to save that it lies in,
            or -1; see ``windows_to_save``.
        with_window: (table rows,) bool, whether that window is lost with the page.
    """

    def __init__(self, table: PageTable, candidates: Candidates) -> None:
        self._table = table
        self._candidates = candidates
        self.end_of = np.full(table.capacity, -1, dtype=np.int64)
        self.with_window = resident_zeros(table.capacity, np.bool_)
        # pages of which those say something
        self._saved = _NO_ROWS
        # pages that are left to copy have the last mark
        self._left = np.zeros(table.capacity, dtype=np.int64)
        self._mark = 0

    def look_ahead(
        self,
        kind: Kind,
        is_dirty: Callable[[Rows], NDArray[np.bool_]],
        copying: int,
        free: int,
        low: int,
    ) -> Ahead:
        """Pages to copy that eviction meets before it has freed ``low`` pages; to be looked for
        again when a third of them are used up.

        Args:
            kind: victims of one component.
            is_dirty: tells with which pages something would be lost.
            copying: pages that can be evicted without a loss when pending backups, which alone
                hold them, have ended.
            free: pages that are free on the device, part of ``low``.
        """
        safe = free + copying
        near = max(0, low - safe)
        enough = low - low // _WAIT_SHARE
        # half as much again is looked at, so that not every step has to look
        reach = low + low // 2 - safe
        rows = self._candidates.first(kind, reach)
        if len(rows) == 0:
            return Ahead(_NO_ROWS, _NO_ROWS, safe - enough, safe - enough)
        lossy = np.flatnonzero(is_dirty(rows))
        n_near = int(np.searchsorted(lossy, near))
        # pages in front of the first lossy one, now and when those near have their copies
        clean, clean_then = (int(lossy[n]) if n < len(lossy) else len(rows) for n in (0, n_near))
        return Ahead(
            dirty=rows[lossy[:n_near]],
            soon=rows[lossy[n_near:]],
            room=safe + clean - enough,
            room_then=safe + clean_then - enough,
        )

    def windows_to_save(self, *are_worth: Callable[[Rows], NDArray[np.bool_]]) -> None:
        """Find the windows on the device that are worth keeping and not kept on the host.

        Args:
            are_worth: each tells of ends whether their windows are worth a copy now; all have to.
        """
        table, size = self._table, self._table.geometry.window_pages
        self.end_of[self._saved] = -1
        self.with_window[self._saved] = False
        ends = self._candidates.all(Kind.UNSAVED)
        for is_so in are_worth:
            ends = ends[is_so(ends)]
        pages = np.empty(len(ends) * size, dtype=np.int64)
        written = loops.windows_to_save(
            table.parent,
            ends,
            table.swa_device.ready,
            table.swa_device.present,
            table.swa_host.present,
            size,
            self.end_of,
            self.with_window,
            pages,
        )
        self._saved = pages[:written]

    def paths(self, ahead: Ahead) -> Iterator[tuple[Rows, Rows]]:
        """(path, pages to copy on it), each page once: those that are dirty, the oldest first, and
        with each those on its path that will be soon. A path that is followed for the sake of a
        window reaches to its end."""
        table, left = self._table, self._left
        self._mark += 1
        left[ahead.dirty] = left[ahead.soon] = self._mark
        rows = ahead.dirty
        while len(rows):
            row = int(rows[0])
            end = int(self.end_of[row])
            path = table.path(row if end < 0 else end)
            pages = path[left[path] == self._mark]
            left[pages] = 0
            yield path, pages
            rows = rows[left[rows] == self._mark]


def worth_a_copy(table: PageTable, policy: WritePolicy, rows: Rows) -> NDArray[np.bool_]:
    """Which pages the write policy keeps."""
    ready: NDArray[np.bool_] = table.device.ready[rows]
    if policy is not WritePolicy.WRITE_THROUGH_SELECTIVE:
        return ready  # all of them
    return ready & worth_keeping(policy, table.hits[rows])
