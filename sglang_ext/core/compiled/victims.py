"""``VictimQueue`` with compiled loops."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows, SlotColumn
from sglang_ext.core.compiled import loops
from sglang_ext.core.eviction import VictimQueue


class CompiledVictims(VictimQueue):
    """Evictable rows of one column in age order; see ``VictimQueue``."""

    def __init__(self, column: SlotColumn, age: NDArray[np.int64]) -> None:
        super().__init__(column, age)
        self._first = 0  # of self._rows, what is before has been handed out

    def _at_front(self, count: int) -> Rows:
        out = np.empty(count, dtype=np.int64)
        column = self._column
        found, self._first = loops.next_victims(
            self._rows, self._ages, self._first, self._age, column.present, column.locks, out
        )
        return out[:found]

    def _below_horizon(self, rows: Rows) -> Rows:
        out = np.empty(len(rows), dtype=np.int64)
        column = self._column
        found = loops.below_horizon(
            rows, self._age, column.present, column.locks, self._horizon, out
        )
        return out[:found]

    def _left(self) -> tuple[Rows, NDArray[np.int64]]:
        return self._rows[self._first :], self._ages[self._first :]

    def _sort(self, rows: Rows) -> None:
        super()._sort(rows)
        self._first = 0
