"""Ranks of priorities: any 64-bit numbers, in the few bits that an age has for them.

Priorities in use have ranks in their order, with gaps for those to come. When one finds no gap, all
are numbered anew, evenly and without those that no page has any more; or, if that was done often,
it shares the rank of its neighbor. So no order is ever inverted, and different priorities are told
apart as long as those in use are far fewer than ranks.
"""

import bisect

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 128
"""So many times all are numbered anew for one priority without a gap; then for as many more as that
was done: where every request has a priority of its own, the cost is forgotten over time."""


class PriorityRanks:
    """Ranks from 1 to ``most``; 0 is that of a page which no request has used.

    Args:
        most: the largest rank.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # priorities [lowest, highest] have a rank; they rise, and ranges do not overlap
        self._lowest: list[int] = []
        self._highest: list[int] = []
        self._ranks: list[int] = []
        self._without_gap = self._times = 0

    def of(self, priority: int) -> int | None:
        """Rank of a priority, which has one from now on; None if there is no gap for it."""
        where = bisect.bisect_left(self._highest, priority)
        known = len(self._ranks)
        if where < known and self._lowest[where] <= priority:
            return self._ranks[where]
        below = self._ranks[where - 1] if where else 0
        above = self._ranks[where] if where < known else self._most + 1
        if above - below < 2:
            return None
        rank = below + self._step(above - below, first=where == 0, last=where == known)
        self._lowest.insert(where, priority)
        self._highest.insert(where, priority)
        self._ranks.insert(where, rank)
        return rank

    def _step(self, gap: int, *, first: bool, last: bool) -> int:
        """Half of a gap; at one end little, since priorities may go on rising or falling."""
        little = min(gap // 2, max(1, self._most >> 8))
        if first == last:
            return gap // 2
        return little if last else gap - little

    def share(self, priority: int) -> int:
        """Rank of a neighbor for a priority without a gap."""
        where = max(0, bisect.bisect_left(self._highest, priority) - 1)
        self._lowest[where] = min(self._lowest[where], priority)
        self._highest[where] = max(self._highest[where], priority)
        return self._ranks[where]

    def is_time_to_spread(self) -> bool:
        """Asked once for each priority without a gap."""
        self._without_gap += 1
        return self._without_gap > self._times - _AT_ONCE

    def spread(self, in_use: NDArray[np.int32]) -> NDArray[np.int64]:
        """Number all anew.

        Args:
            in_use: ranks that pages have, each once, rising.

        Returns:
            (most + 1,) the new rank for each old one; rises, and strictly so for those in use.
        """
        self._without_gap, self._times = 0, self._times + 1
        in_use = in_use[in_use > 0]
        renamed = np.zeros(self._most + 1, dtype=np.int64)
        place = np.arange(1, len(in_use) + 1)
        renamed[in_use] = place * (self._most + 1) // (len(in_use) + 1)
        left = [i for i, rank in enumerate(self._ranks) if renamed[rank]]
        self._lowest = [self._lowest[i] for i in left]
        self._highest = [self._highest[i] for i in left]
        self._ranks = [int(renamed[self._ranks[i]]) for i in left]
        return np.maximum.accumulate(renamed)
