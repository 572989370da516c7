"""Host slots of one component: how much room there is, and how it is taken and given back."""

import numpy as np

from sglang_ext.core.host.compaction import Compaction
from sglang_ext.core.ports import HostPool
from sglang_ext.core.table.columns import Rows, SlotColumn, Slots

SPARE = 8
"""Early copies leave one page free for so many that are taken."""


class NoHost:
    """A pool without room: there is no host tier."""

    def room(self, used: int) -> int:
        """See HostPool."""
        return 0

    def allocate(self, pages: int) -> Slots | None:
        """See HostPool."""
        return None

    def release(self, slots: Slots) -> None:
        """See HostPool."""


class HostSpace:
    """One component's copies on the host.

    Room is counted from the table and from what was allocated before: every rank has
    done the same, so every rank decides alike even when one rank's pool misbehaves.

    Attributes:
        column: the copies on the host.
        detached: pages whose slots are taken and not in the table: abandoned backups still
            write them, prefetches fill them, or they have left the table while storage reads
            them.
        compaction: None where the other component has a memory of its own.
    """

    def __init__(
        self, column: SlotColumn, pool: HostPool, compaction: Compaction | None = None
    ) -> None:
        self.column = column
        self.compaction = compaction
        self.detached = 0
        self._pool = pool
        # first slots of pages that storage reads; True: the page has left the table since
        self._pinned: dict[int, bool] = {}

    @property
    def free_pages(self) -> int:
        """Pages that can be reserved without taking any away."""
        return self._pool.room(self.column.n_present + self.detached)

    def free_for_copies(self, *, needed_now: bool) -> int:
        """Pages that a backup may take. One that is not needed yet leaves some for those
        that will be: they would only take its copies away again."""
        spare = 0 if needed_now else self.column.n_present // SPARE
        return max(0, self.free_pages - spare)

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

    def put(self, rows: Rows, slots: Slots, *, ready: bool) -> None:
        """Rows have copies now, in slots that were reserved or taken."""
        self.column.put(rows, slots, ready=ready)
        if self.compaction is not None:
            self.compaction.note(rows, slots)

    def release(self, slots: Slots) -> None:
        """Give slots back; placeholders are not the pool's."""
        if len(slots) == 0:
            return
        real = slots
        if slots[:, 0].min() < 0:
            real = slots[slots[:, 0] >= 0]
        if self._pinned and len(real):
            busy = np.array([slot in self._pinned for slot in real[:, 0].tolist()])
            for slot in real[busy, 0].tolist():
                self._pinned[slot] = True
                self.detached += 1
            real = real[~busy]
        if len(real):
            self._pool.release(real)

    def pin(self, slots: Slots) -> None:
        """Keep the contents of pages until ``unpin``, whatever becomes of their rows."""
        for slot in slots[:, 0].tolist():
            assert slot not in self._pinned, "a page is pinned twice"
            self._pinned[slot] = False

    def take(self, pages: int) -> tuple[Slots, bool]:
        """Slots that are not in the table yet; see ``reserve``."""
        slots, done = self.reserve(np.arange(pages, dtype=np.int64))
        self.detached += pages
        return slots, done

    def detach(self, pages: int) -> None:
        """Pages have left the table, and their slots are still written."""
        self.detached += pages

    def attach(self, pages: int) -> None:
        """Detached pages come into the table, or their slots are given back."""
        self.detached -= pages

    def give_back(self, slots: Slots) -> None:
        """Detached pages are free."""
        self.detached -= len(slots)
        self.release(slots)

    def unpin(self, slots: Slots) -> None:
        """Nobody reads the pages any more; those that have left the table are free."""
        left = np.array([self._pinned.pop(slot) for slot in slots[:, 0].tolist()], dtype=bool)
        if left.any():
            self.detached -= int(np.count_nonzero(left))
            self._pool.release(slots[left])

    def drop(self, rows: Rows) -> None:
        """Take the copies of ``rows`` away."""
        if len(rows):
            self.release(self.column.take(rows))
