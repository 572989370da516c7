"""What to copy to the host ahead of its eviction from the device.

Eviction takes the oldest pages, so these are copied while there is still room
elsewhere; when their turn comes they are clean and nobody waits for a copy.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows, SlotColumn
from sglang_ext.core.table import UNUSED_BAND, PageTable
from sglang_ext.core.write_policy import WritePolicy, worth_keeping

_CANDIDATES = 4096


def clean_pages(device: SlotColumn, host: SlotColumn) -> int:
    """Pages that eviction can take, or soon can, without a loss."""
    safe = device.present & host.present
    return int(np.count_nonzero(safe & ((device.locks == 0) | ~host.ready)))


def worthless_windows(table: PageTable) -> int:
    """Evictable sliding-window pages that nobody has resumed from: no loss either."""
    column = table.swa_device
    mask = column.present & (column.locks == 0) & ~table.swa_host.present
    return int(np.count_nonzero(table.swa_age[mask] < 0))


def oldest_dirty_paths(table: PageTable, policy: WritePolicy, wanted: int) -> Iterator[Rows]:
    """Paths that end at the oldest evictable pages without a host copy.

    Stops when the paths cover ``wanted`` such pages.
    """
    if wanted <= 0:
        return
    device = table.device
    dirty = device.ready & (device.locks == 0) & ~table.host.present
    rows = np.flatnonzero(dirty)
    rows = rows[worth_keeping(policy, table.hits[rows])]
    for row in _oldest(rows, table.age):
        if wanted <= 0:
            return
        if dirty[row]:
            path = table.path(row)
            wanted -= int(np.count_nonzero(dirty[path]))
            dirty[path] = False
            yield path


def oldest_dirty_windows(
    table: PageTable, policy: WritePolicy, window_pages: int, wanted: int
) -> Iterator[Rows]:
    """Paths that end with the oldest evictable windows without a host copy.

    A page whose window is not whole can resume nobody: it joins those that are
    evicted first.
    """
    if wanted <= 0:
        return
    column = table.swa_device
    dirty = column.ready & (column.locks == 0) & ~table.swa_host.present & (table.swa_age >= 0)
    rows = np.flatnonzero(dirty)
    rows = rows[worth_keeping(policy, table.hits[rows])]
    # on one path deeper is older: the oldest page of a window is its last one
    for row in _oldest(rows, table.swa_age):
        if wanted <= 0:
            return
        if not dirty[row]:
            continue
        path = table.path(row)
        window = path[max(0, len(path) - window_pages) :]
        if (column.ready[window] | table.swa_host.present[window]).all():
            wanted -= int(np.count_nonzero(dirty[window]))
            dirty[window] = False
            yield path
        else:
            table.swa_age[row] += UNUSED_BAND
            column.offer(path[-1:])


def _oldest(rows: Rows, age: NDArray[np.int64]) -> list[int]:
    """The oldest of ``rows``, in order; enough of them for one step."""
    if len(rows) > _CANDIDATES:
        rows = rows[np.argpartition(age[rows], _CANDIDATES)[:_CANDIDATES]]
    order: list[int] = rows[np.argsort(age[rows])].tolist()
    return order
