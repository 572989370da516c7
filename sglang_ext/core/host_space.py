"""Host slots of one component: how much room there is, and what gives way first."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows, SlotColumn, Slots
from sglang_ext.core.eviction import VictimQueue, youngest_first
from sglang_ext.core.ports import HostPool
from sglang_ext.core.table import PageTable

_FEW = 16
"""Up to so many paths are walked one by one rather than a level at a time."""


class HostSpace:
    """One component's copies on the host.

    Room is counted from the table and from what was allocated before: every rank has
    done the same, so every rank decides alike even when one rank's pool misbehaves.

    Attributes:
        column: the copies on the host.
        detached: pages whose slots belong to abandoned backups: still being written,
            no longer in the table.
    """

    def __init__(
        self,
        table: PageTable,
        column: SlotColumn,
        device: SlotColumn,
        age: NDArray[np.int64],
        pool: HostPool,
    ) -> None:
        self.column = column
        self.detached = 0
        self._table = table
        self._device = device
        self._age = age
        self._pool = pool
        self._victims = VictimQueue(column, age, spare=device)

    @property
    def free_pages(self) -> int:
        """Pages that can be reserved without taking any away."""
        return self._pool.room(self.column.n_present + self.detached)

    def reserve(self, rows: Rows) -> tuple[Slots, bool]:
        """Slots for ``rows``; there must be room for them.

        Returns:
            (slots, True), or if this rank's pool fails nevertheless, (placeholders
            that name no slot, False).
        """
        slots = self._pool.allocate(len(rows))
        if slots is not None:
            return slots, True
        per_page = self.column.slots.shape[1]
        # below ABSENT, and distinct for each row
        return (-2 - (rows[:, None] * per_page + np.arange(per_page))).astype(np.int32), False

    def release(self, slots: Slots) -> None:
        """Give slots back; placeholders are not the pool's."""
        real = slots[slots[:, 0] >= 0]
        if len(real):
            self._pool.release(real)

    def drop(self, rows: Rows) -> None:
        """Take the copies of ``rows`` away."""
        self.release(self.column.take(rows))

    def pop_duplicates(self, count: int, younger_than: int) -> Rows:
        """Drop up to ``count`` copies of pages that are on the device too.

        The most recently used go first: their device copies are the last to be
        evicted, so there is most time to copy them again. A copy whose page has
        descendants on the host alone stays: they would be lost with it.

        Args:
            younger_than: age of the youngest page that needs the room. Copies of older
                pages stay, or the two would take each other's place forever.
        """
        column = self.column
        both = column.ready & self._device.ready & (column.locks == 0)
        # a window that nobody has used yet has the smallest age and gives way all the same
        both &= (self._age > younger_than) | (self._age < 0)
        if column is self._table.host and both.any():
            both &= ~self._above_host_only()
        rows = youngest_first(np.flatnonzero(both), self._age, count)
        self.drop(rows)
        return rows

    def _above_host_only(self) -> NDArray[np.bool_]:
        """Mask of pages with a descendant that is on the host alone."""
        table = self._table
        above = np.zeros(table.capacity, dtype=bool)
        level = np.flatnonzero(table.host.present & ~table.device.present)
        while len(level) > _FEW:
            parents = table.parent[level]
            level = np.unique(parents[parents >= 0]).astype(np.int64)
            level = level[~above[level]]
            above[level] = True
        for row in level.tolist():
            above[table.path(row)[:-1]] = True
        return above

    def oldest_age(self) -> int | None:
        """Age of what ``pop_oldest`` would drop first."""
        row = self._victims.peek()
        return None if row is None else int(self._age[row])

    def pop_oldest(self, count: int) -> Rows:
        """Drop up to ``count`` copies of pages that are on the host alone, least
        recently used first, leaf first."""
        rows = self._victims.pop(count)
        self.drop(rows)
        return rows
