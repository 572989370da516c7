"""Which page goes next: the structure that eviction asks."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import order as loops
from sglang_ext.core.compiled.returns import CLASSES
from sglang_ext.core.retention.estimate import Estimate

Rows = NDArray[np.int32]


class Order:
    """Rows of a column by class and last use.

    A row may go when nobody holds it: a child that is here holds its parent, and so does every
    lock. What is held is in no list, and comes back to its place when the last holder goes. Every
    row that may go has a bit in a bitmap of its class, in the order of last use; the pages of a
    class that are of one bin of ages are a range of it. So a victim is the first bit of a range,
    in the first cell of a table that has one: no operation looks at all rows.

    Args:
        parent: (rows,) int32, row of the page before, negative for a first page. Shared with the
            caller, who sets it before a row's first use and leaves it as it is while the row is
            here.
        longest: rows of a path, at most.
    """

    def __init__(self, parent: Rows, longest: int) -> None:
        rows = len(parent)
        # at most as many stamps are in use as there are rows: they are numbered anew once in
        # as many uses
        stamps = 2 * rows + longest + 1
        words = [stamps // 64**power + 1 for power in (1, 2, 3)]
        self._arrays = loops.OrderArrays(
            stamp=np.full(rows, loops.NONE, dtype=np.int32),
            holders=np.zeros(rows, dtype=np.int32),
            room=np.ones(rows, dtype=np.int32),
            parent=parent,
            leaf=np.full(stamps, loops.NONE, dtype=np.int32),
            tick=np.zeros(stamps, dtype=np.int64),
            kind=np.zeros(stamps, dtype=np.int16),
            bits=np.zeros((CLASSES + 1, words[0]), dtype=np.uint64),
            words=np.zeros((CLASSES + 1, words[1]), dtype=np.uint64),
            blocks=np.zeros((CLASSES + 1, words[2]), dtype=np.uint64),
            counts=np.zeros(1, dtype=np.int64),
        )
        self._out = np.empty(rows, dtype=np.int32)

    def __contains__(self, row: int) -> bool:
        return bool(self._arrays.stamp[row] != loops.NONE)

    @property
    def arrays(self) -> loops.OrderArrays:
        """For compiled loops that have an order as a part."""
        return self._arrays

    def use(self, path: Rows, kinds: NDArray[np.int16], tick: int) -> None:
        """A request has used rows; they are here from now on.

        Args:
            path: the first rows of a path, first page first, each the parent of the next.
            kinds: (n,) classes.
            tick: not before that of the last call.
        """
        loops.use(self._arrays, path, kinds, tick)

    def use_of(self, row: int) -> tuple[int, int]:
        """(class, tick) of the last use of a row that is here."""
        stamp = self._arrays.stamp[row]
        return int(self._arrays.kind[stamp]), int(self._arrays.tick[stamp])

    def hold(self, rows: Rows) -> None:
        """Lock rows, here or not: they may not go."""
        loops.hold(self._arrays, rows, 1)

    def release(self, rows: Rows) -> None:
        """Take one lock back."""
        loops.hold(self._arrays, rows, -1)

    def remove(self, row: int) -> None:
        """A row that is here and has no children here leaves for another reason."""
        loops.remove(self._arrays, row)

    def oldest(self, pages: int) -> Rows:
        """Remove and return up to so many rows, least recently used first."""
        return self._out[: loops.oldest(self._arrays, pages, self._out)].copy()

    def cheapest(self, pages: int, estimate: Estimate, tick: int) -> Rows:
        """The same for rows of the least value first.

        Cost: O(1) a row, and one pass over the cells of the table.
        """
        found = loops.cheapest(
            self._arrays, pages, estimate.cells, estimate.ranks, tick, self._out
        )
        return self._out[:found].copy()

    def next_oldest(self) -> int | None:
        """The row that ``oldest`` takes first."""
        row = loops.oldest_leaf(self._arrays)
        return None if row == loops.NONE else row

    def next_cheapest(self, estimate: Estimate, tick: int) -> int | None:
        """The row that ``cheapest`` takes first."""
        row = loops.cheapest_leaf(self._arrays, estimate.cells, estimate.ranks, tick)
        return None if row == loops.NONE else row
