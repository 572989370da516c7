"""``SlotColumn`` with compiled loops."""

import numpy as np

from sglang_ext.core.compiled import loops
from sglang_ext.core.table.columns import Rows, SlotColumn, Slots


class CompiledColumn(SlotColumn):
    """One column of slots; see ``SlotColumn``."""

    def __init__(self, capacity: int, slots_per_page: int) -> None:
        self._counts = np.zeros(2, dtype=np.int64)
        super().__init__(capacity, slots_per_page)
        self._state = (self.present, self.ready, self.locks, self.slots, self._counts)

    @property
    def n_present(self) -> int:
        """Rows with a copy."""
        return int(self._counts[0])

    @n_present.setter
    def n_present(self, count: int) -> None:
        """See SlotColumn."""
        self._counts[0] = count

    @property
    def n_locked(self) -> int:
        """Rows with a copy and a positive lock count."""
        return int(self._counts[1])

    @n_locked.setter
    def n_locked(self, count: int) -> None:
        """See SlotColumn."""
        self._counts[1] = count

    def put(self, rows: Rows, slots: Slots, *, ready: bool) -> None:
        """See SlotColumn."""
        loops.put(*self._state, rows, np.ascontiguousarray(slots), ready)
        self._changed(rows)

    def put_live(self, rows: Rows, slots: Slots) -> None:
        """See SlotColumn; the loop leaves out what is absent."""
        self.put(rows, slots, ready=True)

    def take(self, rows: Rows) -> Slots:
        """See SlotColumn."""
        slots = np.empty((len(rows), self.slots.shape[1]), dtype=np.int32)
        loops.take(*self._state, rows, slots)
        self._changed(rows)
        return slots

    def lock(self, rows: Rows) -> None:
        """See SlotColumn."""
        changed = np.empty(len(rows), dtype=np.int64)
        count = loops.lock(self.present, self.locks, self._counts, rows, changed)
        if count:
            self._changed(changed[:count])

    def unlock(self, rows: Rows) -> None:
        """See SlotColumn."""
        changed = np.empty(len(rows), dtype=np.int64)
        count = loops.unlock(self.present, self.locks, self._counts, rows, changed)
        assert count >= 0, "unlock without a lock"
        if count:
            self._changed(changed[:count])
