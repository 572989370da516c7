"""One column of slots: the copies of one component in one tier."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T", bound=np.generic)

ABSENT = -1

Rows = NDArray[np.int64]
Slots = NDArray[np.int32]


def resident_zeros(shape: int | tuple[int, ...], dtype: type[_T]) -> NDArray[_T]:
    """Zeros in memory that is there from the start.

    ``np.zeros`` gets memory when it is first written to, 2 MiB at a time with huge pages: an
    insert into a part of a table that nobody has used yet would wait milliseconds for it.
    """
    zeros: NDArray[_T] = np.full(shape, 0, dtype=dtype)
    return zeros


class SlotColumn:
    """Which rows have a copy here, in which slots, and who holds it.

    A copy is ABSENT, RESERVED (``present`` and not ``ready``: a transfer is writing
    it) or READY. A copy with a positive lock count is never evicted.

    Attributes:
        slots: (rows, slots_per_page) int32, ABSENT where there is no copy.
        present: (rows,) bool, RESERVED or READY.
        ready: (rows,) bool, READY.
        locks: (rows,) int32, holders of this copy. A row may be locked before it
            has a copy here; the copy is protected from the moment it appears.
        n_present: rows with a copy.
        n_locked: rows with a copy and a positive lock count.
    """

    def __init__(self, capacity: int, slots_per_page: int) -> None:
        self.slots: Slots = np.full((capacity, slots_per_page), ABSENT, dtype=np.int32)
        self.present = resident_zeros(capacity, np.bool_)
        self.ready = resident_zeros(capacity, np.bool_)
        self.locks = resident_zeros(capacity, np.int32)
        self.n_present = 0
        self.n_locked = 0
        self._changed: Callable[[Rows], None] = lambda rows: None

    @property
    def n_evictable(self) -> int:
        """Rows whose copy can be taken away now."""
        return self.n_present - self.n_locked

    def put(self, rows: Rows, slots: Slots, *, ready: bool) -> None:
        """Give rows a copy: ABSENT to READY, or to RESERVED for a transfer."""
        locked = int(np.count_nonzero(self.locks[rows]))
        self.slots[rows] = slots
        self.present[rows] = True
        self.ready[rows] = ready
        self.n_present += len(slots)
        self.n_locked += locked
        self._changed(rows)

    def put_live(self, rows: Rows, slots: Slots) -> None:
        """``put`` of READY copies for those rows whose slots are not ABSENT."""
        live = slots[:, 0] != ABSENT
        self.put(rows[live], slots[live], ready=True)

    def make_ready(self, rows: Rows) -> None:
        """RESERVED to READY: the transfer that wrote the copies is committed."""
        self.ready[rows] = True
        self._changed(rows)

    def take(self, rows: Rows) -> Slots:
        """Remove copies and return their slots (n, slots_per_page)."""
        slots = self.slots[rows].copy()
        self.n_present -= len(slots)
        self.n_locked -= int(np.count_nonzero(self.locks[rows]))
        self.slots[rows] = ABSENT
        self.present[rows] = False
        self.ready[rows] = False
        self._changed(rows)
        return slots

    def lock(self, rows: Rows) -> None:
        """Add one holder to each row; rows are distinct."""
        locks = self.locks[rows]
        self.n_locked += int(np.count_nonzero(self.present[rows] & (locks == 0)))
        self.locks[rows] = locks + 1
        self._changed(rows)

    def unlock(self, rows: Rows) -> None:
        """Remove one holder from each row."""
        locks = self.locks[rows] - 1
        assert locks.size == 0 or locks.min() >= 0, "unlock without a lock"
        self.n_locked -= int(np.count_nonzero(self.present[rows] & (locks == 0)))
        self.locks[rows] = locks
        self._changed(rows)

    def break_locks(self, rows: Rows) -> None:
        """Drop all holders of rows that leave the table."""
        self.n_locked -= int(np.count_nonzero(self.present[rows] & (self.locks[rows] > 0)))
        self.locks[rows] = 0
        self._changed(rows)

    def tell(self, changed: Callable[[Rows], None]) -> None:
        """Call somebody with the rows whose copies or locks have changed."""
        self._changed = changed
