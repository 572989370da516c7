"""One column of slots: the copies of one component in one tier."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import ABSENT as ABSENT
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops

_T = TypeVar("_T", bound=np.generic)

Rows = NDArray[np.int64]
Slots = NDArray[np.int32]
Told = Callable[[Rows], None] | None


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
        loops: compiled or interpreted.
    """

    def __init__(self, capacity: int, slots_per_page: int, loops: Loops = COMPILED) -> None:
        self.slots: Slots = np.full((capacity, slots_per_page), ABSENT, dtype=np.int32)
        self.present = resident_zeros(capacity, np.bool_)
        self.ready = resident_zeros(capacity, np.bool_)
        self.locks = resident_zeros(capacity, np.int32)
        self.loops, self._loops = loops, loops.slots
        self._counts = np.zeros(2, dtype=np.int64)
        self._state = (self.present, self.ready, self.locks, self.slots, self._counts)
        self._copies_changed: Callable[[Rows], None] = lambda rows: None
        self._locked: Told = None
        self._unlocked: Told = None

    @property
    def n_present(self) -> int:
        """Rows with a copy."""
        return int(self._counts.item(0))

    @property
    def n_locked(self) -> int:
        """Rows with a copy and a positive lock count."""
        return int(self._counts.item(1))

    @property
    def n_evictable(self) -> int:
        """Rows whose copy can be taken away now."""
        return self.n_present - self.n_locked

    def put(self, rows: Rows, slots: Slots, *, ready: bool) -> None:
        """Give rows a copy: ABSENT to READY, or to RESERVED for a transfer. Rows whose slots are
        ABSENT get none."""
        self._loops.put(*self._state, rows, np.ascontiguousarray(slots), ready)
        self._copies_changed(rows)

    def make_ready(self, rows: Rows) -> None:
        """RESERVED to READY: the transfer that wrote the copies is committed."""
        self.ready[rows] = True
        self._copies_changed(rows)

    def take(self, rows: Rows) -> Slots:
        """Remove copies and return their slots (n, slots_per_page)."""
        slots = np.empty((len(rows), self.slots.shape[1]), dtype=np.int32)
        self._loops.take(*self._state, rows, slots)
        self._copies_changed(rows)
        return slots

    def lock(self, rows: Rows) -> None:
        """Add one holder to each row; rows are distinct."""
        locked = self._loops.lock(self.present, self.locks, self._counts, rows)
        if locked and self._locked is not None:
            self._locked(rows)

    def unlock(self, rows: Rows) -> None:
        """Remove one holder from each row."""
        unlocked = self._loops.unlock(self.present, self.locks, self._counts, rows)
        assert unlocked >= 0, "unlock without a lock"
        if unlocked and self._unlocked is not None:
            self._unlocked(rows)

    def break_locks(self, rows: Rows) -> None:
        """Drop all holders of rows that leave the table."""
        held = rows[self.locks[rows] > 0]
        if len(held):
            self._counts[1] -= np.count_nonzero(self.present[held])
            self.locks[held] = 0
            if self._unlocked is not None:
                self._unlocked(held)

    def tell(self, changed: Callable[[Rows], None], locked: Told, unlocked: Told) -> None:
        """Call somebody with the rows whose copies have changed.

        Args:
            locked, unlocked: to be called when copies have got their first holder, or lost their
                last one: with these rows and others that were locked, or unlocked, with them.
        """
        self._copies_changed, self._locked, self._unlocked = changed, locked, unlocked

    def tell_copies(self, changed: Callable[[Rows], None]) -> None:
        """Call one more with the rows whose copies have changed. Who is not told costs nothing."""
        first = self._copies_changed

        def both(rows: Rows) -> None:
            first(rows)
            changed(rows)

        self._copies_changed = both
