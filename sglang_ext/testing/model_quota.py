"""What quotas may change: a namespace alone loses pages for its own, those first that are worth
least."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.table.table import PageTable
from sglang_ext.testing.model_page import Key, States
from sglang_ext.testing.model_room import held_with
from sglang_ext.testing.watch import around, require

Worth = Callable[[int], tuple[int, float]]


class QuotaModel:
    """Watches what goes for a quota.

    Attributes:
        taken: copies on the host that went since somebody asked.

    Args:
        states: of all pages, as they are.
        accept: have the model know them so.
        key: of a row.
        worth: of a row, by definition.
    """

    def __init__(
        self,
        index: PrefixCache,
        states: Callable[[], States],
        accept: Callable[[States], None],
        key: Callable[[int], Key],
        worth: Worth,
    ) -> None:
        self._index, self._states, self._accept = index, states, accept
        self._key, self._worth = key, worth
        self.taken: set[Key] = set()
        around(index.own_room, "_drop", self._watch_drop)
        around(index.own_room, "_drop_tail", self._watch_tail)

    def take(self) -> set[Key]:
        """See ``taken``; the next who asks is told of others."""
        taken, self.taken = self.taken, set()
        return taken

    def _watch_drop(self, drop: Callable[..., int], namespace: Hashable, *args: Any) -> int:
        before = self._states()
        number = drop(namespace, *args)
        after = self._states()
        for key, states in before.items():
            if after.get(key) != states:
                require(key[0] == namespace, "a quota cost a page of another namespace")
                require(key in after or not states[0], "a quota cost a page on the device")
                self.taken |= {key} if states[1] else set()
        require(after.keys() <= before.keys(), "a quota made a page")
        self._accept(after)
        return number

    def _watch_tail(self, drop: Callable[..., bool], *args: Any) -> bool:
        """The end that goes is one of those that are worth least, of those that may go."""
        table, kept = self._index.table, self._index.kept
        ends = np.flatnonzero(kept.ends & (kept.below == 1)).tolist()
        worth = {row: (self._key(row)[0], self._worth(row)) for row in ends if self._may_go(row)}
        generations = table.generation.copy()
        dropped = drop(*args)
        gone = [
            row for row in ends if not kept.ends[row] or table.generation[row] != generations[row]
        ]
        require(len(gone) == dropped, "not one prefix went")
        for row in gone:
            require(row in worth, "an end went that is in use")
            least = min(value for own, value in worth.values() if own == worth[row][0])
            require(worth[row][1] == least, "an end went before one that is worth less")
        return dropped

    def _may_go(self, end: int) -> bool:
        table, below = self._index.table, self._index.kept.below
        if end in self._index.pins.ends:
            return False
        path = table.path(end)
        alone = path[(below[path] == 1) & ~table.device.present[path]]
        own = held_with(self._index, self._index.window_of(path))
        return not (table.swa_host.locks[own].any() or table.host.locks[alone].any())


def used(index: PrefixCache, namespace: Hashable) -> int:
    """Bytes that a namespace has on the host, or that come for it, by definition."""
    table, (page, window) = index.table, index.quotas.page_bytes
    root = table.root(namespace)
    own = _roots(table) == root if root is not None else np.zeros(table.capacity, dtype=bool)
    pages = int(np.count_nonzero(own & table.host.present))
    windows = int(np.count_nonzero(own & table.swa_host.present))
    for prefetch in index.prefetches.reading.values():
        if prefetch.namespace == namespace:
            for stage in prefetch.stages[prefetch.published :]:
                pages, windows = pages + len(stage.full), windows + len(stage.window)
    return pages * page + windows * window


def _roots(table: PageTable) -> Any:
    """Of each row the root of its namespace; FREE of those that are free."""
    roots = table.parent.copy()
    while (inner := roots >= 0).any():
        roots[inner] = table.parent[roots[inner]]
    return roots
