"""Which page goes next: the structure that eviction asks."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import order as loops
from sglang_ext.core.compiled.returns import CLASSES
from sglang_ext.core.retention.estimate import Estimate

Rows = NDArray[np.int32]


class Lane:
    """Rows of one column: where they may go, and in which order; a part of an Order."""

    def __init__(self, arrays: Any, lane: int) -> None:
        self._arrays = arrays
        self._lane = lane
        self._out = np.empty(len(arrays.stamp), dtype=np.int32)

    def __contains__(self, row: int) -> bool:
        return bool(self._arrays.here[self._lane, row])

    def is_held(self, row: int) -> bool:
        """Whether a row has children here, or locks; it need not be here itself."""
        return bool(self._arrays.holders[self._lane, row] > 0)

    def put(self, rows: Rows) -> None:
        """Rows that have been used come here, if they are not here already."""
        loops.put(self._arrays, self._lane, rows)

    def hold(self, rows: Rows) -> None:
        """Lock rows, here or not: they may not go."""
        loops.hold(self._arrays, self._lane, rows, 1)

    def release(self, rows: Rows) -> None:
        """Take one lock back."""
        loops.hold(self._arrays, self._lane, rows, -1)

    def remove(self, row: int) -> None:
        """A row that is here leaves for another reason than eviction."""
        assert row in self, f"row {row} is not here"
        loops.remove(self._arrays, self._lane, row)

    def oldest(self, pages: int) -> Rows:
        """Remove and return up to so many rows, least recently used first."""
        return self._out[: loops.oldest(self._arrays, self._lane, pages, self._out)].copy()

    def cheapest(self, pages: int, estimate: Estimate, tick: int) -> Rows:
        """The same for rows of the least value first.

        Cost: O(1) a row, and once the cells that have a row which may go.
        """
        found = loops.cheapest(
            self._arrays, self._lane, pages, estimate.cells, estimate.ranks, tick, self._out
        )
        return self._out[:found].copy()

    def next_oldest(self) -> int | None:
        """The row that ``oldest`` takes first."""
        row = int(loops.oldest_leaf(self._arrays, self._lane))
        return None if row == loops.NONE else row

    def next_cheapest(self, estimate: Estimate, tick: int) -> int | None:
        """The row that ``cheapest`` takes first."""
        row = int(
            loops.cheapest_leaf(self._arrays, self._lane, estimate.cells, estimate.ranks, tick)
        )
        return None if row == loops.NONE else row


class Order:
    """Rows of a table by class and last use, for several columns.

    A row may go when nobody holds it: a child that is in the same column holds its parent, and so
    does every lock. What is held is in no list, and comes back to its place when the last holder
    goes. Every row that may go has a bit in a bitmap of its class, in the order of last use; the
    pages of a class that are of one bin of ages are a range of it. So a victim is the first bit of
    a range, in the first cell of a table that has one: no operation looks at all rows.

    Those rows of a column that one request was the last to use are on one path without a gap.
    Of the host's pages only those can be a column that the device does not have.

    Args:
        parent: (rows,) int32, row of the page before, negative for a first page. Shared with the
            caller, who sets it before a row's first use and leaves it as it is while the row is
            here.
        longest: rows of a path, at most.
        lanes: columns.

    Attributes:
        lanes: see Lane.
    """

    def __init__(self, parent: Rows, longest: int, lanes: int = 1) -> None:
        rows = len(parent)
        # at most as many stamps are in use as there are rows, so they are numbered anew once in
        # at least as many uses
        stamps = 2 * rows + longest + 1
        words = [stamps // 64**power + 1 for power in (1, 2, 3)]
        lists = lanes * (CLASSES + 1)
        self._arrays = loops.OrderArrays(
            stamp=np.full(rows, loops.NONE, dtype=np.int32),
            parent=parent,
            room=np.ones(rows, dtype=np.int32),
            tick=np.zeros(stamps, dtype=np.int64),
            kind=np.zeros(stamps, dtype=np.int16),
            counts=np.zeros(1, dtype=np.int64),
            here=np.zeros((lanes, rows), dtype=np.bool_),
            holders=np.zeros((lanes, rows), dtype=np.int32),
            leaf=np.full((lanes, stamps), loops.NONE, dtype=np.int32),
            bits=np.zeros((lists, words[0]), dtype=np.uint64),
            words=np.zeros((lists, words[1]), dtype=np.uint64),
            blocks=np.zeros((lists, words[2]), dtype=np.uint64),
        )
        self.lanes = [Lane(self._arrays, lane) for lane in range(lanes)]

    @property
    def arrays(self) -> Any:
        """For compiled loops that have an order as a part."""
        return self._arrays

    def use(self, path: Rows, kinds: NDArray[np.int16], tick: int) -> None:
        """A request has used rows, wherever they are.

        Args:
            path: the first rows of a path, first page first, each the parent of the next.
            kinds: (n,) classes.
            tick: larger than that of the last call.
        """
        loops.use(self._arrays, path, kinds, tick)

    def use_of(self, row: int) -> tuple[int, int]:
        """(class, tick) of the last use of a row that is in a column."""
        stamp = self._arrays.stamp[row]
        return int(self._arrays.kind[stamp]), int(self._arrays.tick[stamp])
