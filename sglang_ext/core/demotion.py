"""What to copy to the host ahead of its eviction from the device.

Eviction takes the oldest pages, so the oldest ones must have their copies while there
is still room elsewhere; when their turn comes nobody waits for a copy.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows, SlotColumn
from sglang_ext.core.table import UNUSED_BAND, PageTable
from sglang_ext.core.write_policy import WritePolicy, worth_keeping

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Ahead:
    """What a look at the pages that eviction takes next has found.

    Attributes:
        dirty: rows to copy to the host now, oldest first.
        room: pages that can be allocated or locked before there is more to copy.
    """

    dirty: Rows
    room: int


def look_ahead(
    device: SlotColumn,
    host: SlotColumn,
    age: NDArray[np.int64],
    keep: NDArray[np.bool_],
    holds: NDArray[np.int16] | int,
    free: int,
    low: int,
) -> Ahead:
    """Pages without a host copy that eviction meets before it has freed ``low`` pages.

    Args:
        device, host: copies of one component.
        age: (table rows,) int64, smaller is evicted first.
        keep: (table rows,) bool, which pages are worth a copy.
        holds: locks that pending backups have on each page.
        free: pages that are free on the device, part of ``low``.
    """
    # pages that backups alone hold can be evicted without a loss when those have ended
    copying = device.present & host.present & ~host.ready & (device.locks == holds)
    safe = free + int(np.count_nonzero(copying))
    near = max(0, low - safe)
    # half as much again is looked at, so that not every step has to look
    reach = low + low // 2 - safe
    if reach <= 0:
        return Ahead(_NO_ROWS, safe - low)
    rows = np.flatnonzero(device.present & (device.locks == 0))
    if len(rows) > reach:
        rows = rows[np.argpartition(age[rows], reach)[:reach]]
    rows = rows[np.argsort(age[rows])]
    dirty = keep[rows] & ~host.present[rows]
    clean = int(dirty.argmax()) if dirty.any() else len(rows)
    return Ahead(rows[:near][dirty[:near]], safe + clean - low)


def paths_of_pages(table: PageTable, rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    """(path, those of ``rows`` on it), each row once; ``rows`` come oldest first."""
    left = np.zeros(table.capacity, dtype=bool)
    left[rows] = True
    for row in rows.tolist():
        if left[row]:
            path = table.path(row)
            on_path = path[left[path]]
            left[on_path] = False
            yield path, on_path


def paths_of_windows(table: PageTable, rows: Rows, window_pages: int) -> Iterator[Rows]:
    """Paths that end with the windows of the pages ``rows``, oldest first.

    On one path deeper is older, so the oldest page of a window is its last one. A page
    whose window is not whole joins those that are evicted first.
    """
    column = table.swa_device
    covered = np.zeros(table.capacity, dtype=bool)
    for row in rows.tolist():
        if covered[row]:
            continue
        path = table.path(row)
        window = path[max(0, len(path) - window_pages) :]
        covered[window] = True
        if (column.ready[window] | table.swa_host.present[window]).all():
            yield path
        else:
            table.swa_age[row] += UNUSED_BAND
            column.offer(path[-1:])


def worth_a_copy(table: PageTable, policy: WritePolicy) -> NDArray[np.bool_]:
    """Mask of pages that the write policy keeps."""
    return table.device.ready & worth_keeping(policy, table.hits)
