"""``VictimQueue`` with compiled scans."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import scans
from sglang_ext.core.device.victims import BATCH, VictimQueue
from sglang_ext.core.table.columns import Rows, SlotColumn

_SHARE = 64
"""A pass takes at least one in so many victims,"""
_SAMPLE = 1024
"""and looks at about so many rows to tell which."""
_NO_HORIZON = (1 << 63) - 1


class CompiledVictims(VictimQueue):
    """Evictable rows of one column in age order; see ``VictimQueue``."""

    def __init__(self, column: SlotColumn, age: NDArray[np.int64]) -> None:
        super().__init__(column, age)
        self._mark = np.zeros(len(age), dtype=np.bool_)

    def restart(self) -> None:
        """See VictimQueue."""
        super().restart()
        self._first = 0  # of self._rows, what is before is no victim any more

    def _at_front(self, count: int) -> Rows:
        out = np.empty(count, dtype=np.int64)
        column = self._column
        found, self._first = scans.next_victims(
            self._rows, self._ages, self._first, self._age, column.present, column.locks, out
        )
        return out[:found]

    def _merge(self, offers: list[Rows]) -> None:
        if not offers:
            return
        offered = np.concatenate(offers)
        left, ages = self._left()
        out = np.empty(len(left) + len(offered), dtype=np.int64)
        column = self._column
        found, new = scans.merge_victims(
            left,
            ages,
            offered,
            self._age,
            column.present,
            column.locks,
            self._horizon,
            self._mark,
            out,
        )
        if new:
            self._sort(out[:found])

    def _refill(self, count: int) -> None:
        """See VictimQueue; where the horizon is to be is guessed from a sample, so that one pass
        over the column is all that it takes. Whatever it is, what comes out first is the same."""
        column, age = self._column, self._age
        victims = column.n_evictable
        wanted = max(BATCH, 4 * count, victims // _SHARE)
        step = max(1, len(age) // _SAMPLE)
        ages = np.empty(len(age) // step + 1, dtype=np.int64)
        ages = ages[: scans.sample_victims(age, column.present, column.locks, step, ages)]
        ages.sort()
        out = np.empty(victims, dtype=np.int64)
        found = 0
        while found < min(count, victims):
            rank = wanted * len(ages) // max(1, victims)
            horizon = int(ages[rank]) if rank < len(ages) else _NO_HORIZON
            found = scans.victims_up_to(age, column.present, column.locks, horizon, out)
            if horizon == _NO_HORIZON:
                break
            wanted *= 4
        self._sort(out[:found])
        self._horizon = int(self._ages[-1])

    def _left(self) -> tuple[Rows, NDArray[np.int64]]:
        return self._rows[self._first :], self._ages[self._first :]

    def _sort(self, rows: Rows) -> None:
        super()._sort(rows)
        self._first = 0
