"""Victim selection: least recently used, leaf first, in batches."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import TICK_SHIFT
from sglang_ext.core.table.columns import Rows, SlotColumn

BATCH = 512
_SHARE = 64
"""A pass takes at least one in so many victims,"""
_SAMPLE = 1024
"""and looks at about so many rows to tell which."""
_NO_PASS_YET = -(1 << 63)
_NO_HORIZON = (1 << 63) - 1
_SPARE_SHARE = 32
"""One eviction frees at most this part of the device beyond what was asked for,"""
_SPARE_TIMES = 63
"""and at most so many times what was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spare:
    """What an eviction may free beyond what was asked for, so that the next ones find the work
    done: most of what an eviction costs does not depend on how much it frees.

    Attributes:
        pages: full-attention pages on the device.
        window_pages: the same for sliding-window copies.
    """

    pages: int = 0
    window_pages: int = 0

    @classmethod
    def for_device(cls, pages: int, window_pages: int) -> "Spare":
        """What a server with so many device pages of each component runs with."""
        return cls(pages // _SPARE_SHARE, window_pages // _SPARE_SHARE)

    def beside(self, pages: int) -> int:
        """Pages beyond ``pages`` asked for."""
        return min(self.pages, _SPARE_TIMES * pages)

    def beside_windows(self, pages: int) -> int:
        """The same for sliding-window copies."""
        return min(self.window_pages, _SPARE_TIMES * pages)


NO_SPARE = Spare()


def youngest_first(rows: Rows, age: NDArray[np.int64], count: int) -> Rows:
    """Up to ``count`` of ``rows``, most recently used first; of pages used at the same
    tick the deepest first, so a path loses its end before its beginning."""
    ages = age[rows]
    order = np.lexsort((ages, -(ages >> TICK_SHIFT)))
    return rows[order[:count]]


class VictimQueue:
    """Evictable rows of one column in age order.

    One pass over the column selects and sorts a batch: all victims up to an age, the
    horizon. Later calls consume it, skip every row that was locked, evicted or used
    since (its age changed), and merge in rows below the horizon that have become
    victims since. Order is leaf-first: a descendant is older than its ancestor, and
    a lock that hides a descendant hides the ancestor too.

    Args:
        column: what is evicted.
        age: (rows,) int64, smaller goes first.
    """

    def __init__(self, column: SlotColumn, age: NDArray[np.int64]) -> None:
        self._column = column
        self._age = age
        self._scans = column.loops.scans
        self._mark = np.zeros(len(age), dtype=np.bool_)
        self.restart()

    def restart(self) -> None:
        """Ages have changed: the next call begins with a pass."""
        self._rows: Rows = np.empty(0, dtype=np.int64)
        self._ages: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._first = 0  # of self._rows, what is before is no victim any more
        self._horizon = _NO_PASS_YET

    def first(self, count: int) -> Rows:
        """The next ``count`` victims, oldest first; fewer if there are not as many.

        They stay in the queue until they have been evicted.
        """
        count = min(count, self._column.n_evictable)
        if count <= 0:
            return self._rows[:0]
        offers = self._column.take_offers()
        if offers is None:
            self._refill(count)
        else:
            self._merge(offers)
        rows = self._at_front(count)
        if len(rows) < count:
            self._refill(count)
            rows = self._at_front(count)
        assert len(rows) == count, "fewer victims than counted"
        return rows

    def _at_front(self, count: int) -> Rows:
        """The next ``count`` victims in the batch at hand, fewer if it is short. What is in front
        of them is no victim any more and leaves the batch."""
        out = np.empty(count, dtype=np.int64)
        column = self._column
        found, self._first = self._scans.next_victims(
            self._rows, self._ages, self._first, self._age, column.present, column.locks, out
        )
        return out[:found]

    def _merge(self, offers: list[Rows]) -> None:
        if not offers:
            return
        offered = np.concatenate(offers)
        left, ages = self._rows[self._first :], self._ages[self._first :]
        out = np.empty(len(left) + len(offered), dtype=np.int64)
        column = self._column
        found, new = self._scans.merge_victims(
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

    def _sort(self, rows: Rows) -> None:
        ages = self._age[rows]
        # along a path ages fall, and what is left of a batch is in order: a sort that makes use
        # of runs takes a fifth of the time
        order = ages.argsort(kind="stable")
        self._rows, self._ages, self._first = rows[order], ages[order], 0

    def _refill(self, count: int) -> None:
        """Where the horizon is to be is guessed from a sample, so that one pass over the column is
        all that it takes. Whatever it is, what comes out first is the same."""
        column, age = self._column, self._age
        victims = column.n_evictable
        wanted = max(BATCH, 4 * count, victims // _SHARE)
        step = max(1, len(age) // _SAMPLE)
        ages = np.empty(len(age) // step + 1, dtype=np.int64)
        ages = ages[: self._scans.sample_victims(age, column.present, column.locks, step, ages)]
        ages.sort()
        out = np.empty(victims, dtype=np.int64)
        found = 0
        while found < min(count, victims):
            rank = wanted * len(ages) // max(1, victims)
            horizon = int(ages[rank]) if rank < len(ages) else _NO_HORIZON
            found = self._scans.victims_up_to(age, column.present, column.locks, horizon, out)
            if horizon == _NO_HORIZON:
                break
            wanted *= 4
        self._sort(out[:found])
        self._horizon = int(self._ages[-1])


def cheapest_first(
    saved: NDArray[np.int64], freed: NDArray[np.int64], idle: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Order of windows: the first ones are worth the least.

    What a window is worth is the recompute that it saves for each page it takes, less the
    longer nobody has used it.

    Args:
        saved: (n,) pages computed again if a request would have resumed there.
        freed: (n,) pages that are free without it, at least 1.
        idle: (n,) ticks since it was used, at least 0.
    """
    order: NDArray[np.int64] = np.argsort(saved / (freed * (idle + 1.0)), kind="stable")
    return order
