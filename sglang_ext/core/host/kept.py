"""Windows on the host, each as one unit: kept whole, dropped whole."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import copies
from sglang_ext.core.compiled import kept as loops
from sglang_ext.core.table.columns import Rows, resident_zeros
from sglang_ext.core.table.table import PageTable


class Forgotten(NamedTuple):
    """What nothing on the host leads to when the last kept window of a prefix is gone; rows.

    Attributes:
        windows: pages of it that are needed no longer.
        copies: of what is on the device too, and that nobody holds.
        lost: what is nowhere else, in the order of the path.
        above: end of what is the last kept window of the prefix then; -1 for none, and where other
            prefixes go on from there.
    """

    windows: Rows
    copies: Rows
    lost: Rows
    above: int


class KeptWindows:
    """The windows that the host keeps, and what they hold there.

    A page lies in every kept window that ends with it or up to ``window_pages - 1`` pages
    below it, so windows share pages: a page is needed as long as one of them is kept.

    Attributes:
        ends: (rows,) bool, the window that ends with this page is kept.
        uses: (rows,) int32, kept windows that this page lies in.
        pinned: (rows,) bool, the page is in the last window of a pinned prefix.
        below: (rows,) int32, kept windows that end with this page or below it. A page with
            none leads to no resume point on the host.
        beyond: ends of windows that are kept because there was room; some may have been asked
            for since.
    """

    def __init__(self, table: PageTable, window_pages: int) -> None:
        self.ends = resident_zeros(table.capacity, np.bool_)
        self.uses = resident_zeros(table.capacity, np.int32)
        self.pinned = resident_zeros(table.capacity, np.bool_)
        self.below = resident_zeros(table.capacity, np.int32)
        self.beyond: set[int] = set()
        self._table = table
        self._window_pages = window_pages
        self._changed: Callable[[Rows], None] = lambda rows: None

    def tell(self, changed: Callable[[Rows], None]) -> None:
        """Call somebody with the paths on which the kept windows have changed."""
        self._changed = changed

    def pin(self, rows: Rows, *, pinned: bool) -> None:
        """Pages are in the last windows of pinned prefixes, or are no longer."""
        self.pinned[rows] = pinned

    def add(self, path: Rows) -> None:
        """Keep the window at the end of a path; all of it is on the host."""
        assert not self.ends[path[-1]], "a window is kept twice"
        changed = np.empty(len(path), dtype=np.int64)
        count = loops.add(self.ends, self.uses, self.below, path, self._window_pages, changed)
        self._note(changed[:count])

    def remove(self, end: int) -> Rows:
        """Keep a window no longer; returns its pages that no other kept window needs."""
        self.beyond.discard(end)
        changed = np.empty(int(self._table.depth[end]) + 1, dtype=np.int64)
        unneeded = np.empty(self._window_pages, dtype=np.int64)
        count, free = loops.remove(
            self._table.parent,
            self.ends,
            self.uses,
            self.below,
            end,
            self._window_pages,
            changed,
            unneeded,
        )
        self._note(changed[:count])
        return unneeded[:free]

    def remove_tail(self, end: int, state: int) -> Forgotten:
        """``remove`` of a window with no other below it, and what that leaves without one.

        Args:
            state: see ``Candidates``.
        """
        self.beyond.discard(end)
        changed, rows = np.empty((2, int(self._table.depth[end]) + 1), dtype=np.int64)
        windows = np.empty(self._window_pages, dtype=np.int64)
        count, free, n_copies, n_lost, above = copies.forget_tail(
            state, end, self._window_pages, changed, windows, rows
        )
        self._note(changed[:count])
        return Forgotten(windows[:free], rows[:n_copies], rows[len(rows) - n_lost :], above)

    def _note(self, rows: Rows) -> None:
        self._changed(rows)

    def spare(self) -> Rows:
        """Ends of those that nobody has asked for since and that have others below them,
        rising."""
        ends = np.array(sorted(self.beyond), dtype=np.int64)
        spare: Rows = ends[~self._table.resume[ends] & (self.below[ends] > 1)]
        return spare

    def above(self, end: int) -> int | None:
        """End of the nearest kept window above the one that ends with ``end``."""
        path = self._table.path(end)[:-1]
        kept = np.flatnonzero(self.ends[path])
        return int(path[kept[-1]]) if len(kept) else None

    def windows(self, ends: Rows) -> NDArray[np.int64]:
        """(n, window_pages) rows of the windows that end with ``ends``, the last page first;
        -1 where a window begins with the prompt."""
        windows = np.empty((len(ends), self._window_pages), dtype=np.int64)
        loops.windows(self._table.parent, ends, windows)
        return windows
