"""What to copy to the host ahead of its eviction from the device.

Eviction takes the oldest pages, so the oldest ones must have their copies while there
is still room elsewhere; when their turn comes nobody waits for a copy.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.host.kept import Checkpoints
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.write_policy import WritePolicy, worth_keeping

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NO_HOLDS = np.empty(0, dtype=np.int16)
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
    """Looks at what eviction takes next."""

    def __init__(self, table: PageTable, kept: Checkpoints) -> None:
        self._table = table
        self._kept = kept

    def look_ahead(
        self,
        device: SlotColumn,
        host: SlotColumn,
        age: NDArray[np.int64],
        dirty: NDArray[np.bool_],
        holds: NDArray[np.int16] | int,
        free: int,
        low: int,
    ) -> Ahead:
        """Pages to copy that eviction meets before it has freed ``low`` pages; to be looked for
        again when a third of them are used up.

        Args:
            device, host: copies of one component.
            age: (table rows,) int64, smaller is evicted first.
            dirty: (table rows,) bool, pages with which something would be lost.
            holds: locks that pending backups have on each page.
            free: pages that are free on the device, part of ``low``.
        """
        rows, copying = self.evictable(device, host, holds)
        safe = free + copying
        near = max(0, low - safe)
        enough = low - low // _WAIT_SHARE
        # half as much again is looked at, so that not every step has to look
        reach = low + low // 2 - safe
        if reach <= 0 or len(rows) == 0:
            return Ahead(_NO_ROWS, _NO_ROWS, safe - enough, safe - enough)
        if len(rows) > reach:
            rows = rows[np.argpartition(age[rows], reach)[:reach]]
        rows = rows[np.argsort(age[rows], kind="stable")]
        lossy = np.flatnonzero(dirty[rows])
        n_near = int(np.searchsorted(lossy, near))
        # pages in front of the first lossy one, now and when those near have their copies
        clean, clean_then = (int(lossy[n]) if n < len(lossy) else len(rows) for n in (0, n_near))
        return Ahead(
            dirty=rows[lossy[:n_near]],
            soon=rows[lossy[n_near:]],
            room=safe + clean - enough,
            room_then=safe + clean_then - enough,
        )

    def evictable(
        self, device: SlotColumn, host: SlotColumn, holds: NDArray[np.int16] | int
    ) -> tuple[Rows, int]:
        """Pages that can be evicted, and how many can be without a loss when pending backups,
        which alone hold them, have ended."""
        rows = np.empty(device.n_evictable, dtype=np.int64)
        each, by_row = (holds, _NO_HOLDS) if isinstance(holds, int) else (-1, holds)
        found, copying = device.loops.scans.evictable(
            device.present, device.locks, host.present, host.ready, by_row, each, rows
        )
        assert found == len(rows), "more or fewer pages can be evicted than counted"
        return rows, int(copying)

    def windows_to_save(
        self, worth: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Windows on the device that are worth keeping and not kept on the host.

        Args:
            worth: (table rows,) bool, pages whose windows are.

        Returns:
            (table rows,): for each page the end of such a window that it lies in, or -1; and
            whether that window is lost with the page.
        """
        table = self._table
        end_of = np.full(table.capacity, -1, dtype=np.int64)
        lost = np.zeros(table.capacity, dtype=np.bool_)
        table.loops.scans.windows_to_save(
            table.parent,
            worth,
            self._kept.ends,
            table.swa_device.ready,
            table.swa_device.present,
            table.swa_host.present,
            table.geometry.window_pages,
            end_of,
            lost,
        )
        return end_of, lost


def paths_of_pages(
    table: PageTable, rows: Rows, soon: Rows, window_end: NDArray[np.int64]
) -> Iterator[tuple[Rows, Rows]]:
    """(path, those of ``rows`` on it), each row once; ``rows`` come oldest first.

    Args:
        soon: more rows; those on the path of one of ``rows`` go along with it.
        window_end: (table rows,), see ``Demotion.windows_to_save``: a path that is followed for the
            sake of a window reaches to its end.
    """
    left = np.zeros(table.capacity, dtype=bool)
    left[rows] = left[soon] = True
    for row in rows.tolist():
        if left[row]:
            path = table.path(row if window_end[row] < 0 else int(window_end[row]))
            on_path = path[left[path]]
            left[on_path] = False
            yield path, on_path


def worth_a_copy(table: PageTable, policy: WritePolicy) -> NDArray[np.bool_]:
    """Mask of pages that the write policy keeps."""
    return table.device.ready & worth_keeping(policy, table.hits)
