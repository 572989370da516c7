"""``PathTable`` with compiled loops, and an index of digests that they can search."""

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import loops, siblings
from sglang_ext.core.compiled.arrays import FIELDS, table_of
from sglang_ext.core.compiled.columns import CompiledColumn
from sglang_ext.core.eviction_policy import Rank, lfu, lru, priority, slru
from sglang_ext.core.plan import PrefixMatch
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import Page, PathTable
from sglang_ext.core.table.table import NO_LESS, AgeLimits

_POLICIES: dict[Rank, int] = {
    lru: loops.LRU,
    lfu: loops.LFU,
    slru: loops.SLRU,
    priority: loops.PRIORITY,
}
_BUCKETS_PER_ROW = 2
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NOTHING = PrefixMatch(_NO_ROWS, 0, 0)


def _room(pages: Pages, rest: Page) -> Rows:
    """What the compiled match writes to where it may end inside a page, see ``loops.match``."""
    count = len(pages) + 1
    if len(rest) == 0:
        return np.empty(count, np.int64)
    room = np.empty(count + len(rest), np.int64)
    room[count:] = rest
    return room


class CompiledTable(PathTable):
    """The page table; see ``PageTable`` and ``PathTable``."""

    column_type: type[SlotColumn] = CompiledColumn

    def __init__(
        self, geometry: Geometry, capacity: int, rank: Rank = lru, limits: AgeLimits = NO_LESS
    ) -> None:
        super().__init__(geometry, capacity, rank, limits)
        buckets = 1 << max(1, (_BUCKETS_PER_ROW * capacity - 1).bit_length())
        self._buckets = np.full(buckets, loops.EMPTY, dtype=np.uint64)
        self._policy = _POLICIES[rank]
        self._window = geometry.window_pages
        self._seeds: dict[int, int] = {}
        links = capacity + 1 if geometry.resumes_inside else 1
        arrays: dict[str, NDArray[Any]] = {
            **{name: getattr(self, name) for name in FIELDS if hasattr(self, name)},
            "last_request": self._last_request,
            "device": self.device.present,
            "swa_device": self.swa_device.present,
            "swa_locks": self.swa_device.locks,
            "swa_host_ready": self.swa_host.ready,
            "buckets": self._buckets,
            "weights": self._hasher.weights,
            "links": np.full((links, 3), -1, dtype=np.int32),
        }
        self._kept = arrays
        self._addresses = table_of(arrays, geometry.device_page)
        self._arrays = int(self._addresses.ctypes.data)

    # ---- lookup --------------------------------------------------------------

    def lookup(self, pages: Pages, namespace: Hashable) -> Rows:
        """See PageTable."""
        root = self._roots.get(namespace)
        if root is None:
            return _NO_ROWS
        rows = np.empty(len(pages), dtype=np.int64)
        return rows[: loops.lookup(self._arrays, pages, root, self._seed(root), rows)]

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """See PathTable."""
        root = self._roots.get(namespace)
        if root is None:
            return _NOTHING
        rows = np.empty(len(pages), np.int64) if rest is None else _room(pages, rest)
        behind, best, ready, to_pin, cut = loops.match(
            self._arrays, pages, root, self._seed(root), self._window, rows
        )
        return PrefixMatch(rows[:best], ready, to_pin, behind, cut)

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """See PathTable."""
        root = self._roots.get(namespace)
        if root is None:
            return _NOTHING
        # what most requests wait for: no call that is not needed
        rows = np.empty(len(pages), np.int64) if rest is None else _room(pages, rest)
        tick = self.tick + 1
        behind, best, ready, to_pin, cut = loops.match_and_use(
            self._arrays,
            pages,
            root,
            self._seeds[root],
            tick - self._first_tick,
            self._policy,
            self._window,
            rows,
        )
        if best:
            self._set_tick(tick)
        elif behind == 0:
            return _NOTHING
        return PrefixMatch(rows[:best], ready, to_pin, behind, cut)

    def inside(self, parent: int, page: Page, *, usable: bool = True) -> tuple[int, int]:
        """See PageTable."""
        found: tuple[int, int] = siblings.inside(self._arrays, parent, page.reshape(1, -1), usable)
        return found

    def row_of(self, digest: int) -> int | None:
        """See PageTable."""
        row: int = loops.find(self._buckets, self.digest, digest)
        return None if row < 0 else row

    def n_indexed(self) -> int:
        """See PageTable."""
        return int(np.count_nonzero(self._buckets != loops.EMPTY))

    def _seed(self, root: int) -> int:
        seed = self._seeds.get(root)
        if seed is None:
            seed = self._seeds[root] = self._hasher.seed(root)
        return seed

    # ---- rows ----------------------------------------------------------------

    def add_rows(self, above: Rows, pages: Pages, namespace: Hashable) -> Rows:
        """See PageTable."""
        root = self._root_of(namespace)
        depth = len(above)
        pages = pages[: self._limits.pages - depth]
        parent = int(above[-1]) if depth else root
        digest = int(self.digest[parent]) if depth else self._seed(root)
        rows = np.empty(len(pages), dtype=np.int64)
        count, self._cursor = loops.append(
            self._arrays,
            pages,
            parent,
            digest,
            depth,
            self.now,
            self._cursor,
            rows,
        )
        self.n_rows += count
        if count == 0:
            self._drop_empty_root(namespace)
        elif depth == 0:
            self._root_rows[root] += 1
        return rows[:count]

    def remove_rows(self, rows: Rows) -> None:
        """See PageTable."""
        roots = np.empty(len(rows), dtype=np.int64)
        childless = loops.remove(self._arrays, rows, roots)
        assert childless, "removed a row that still has children"
        self.resume_if_room[rows] = False
        self.n_rows -= len(rows)
        for root in roots[roots < 0].tolist():
            self._leave_root(root)

    def _forget_root(self, root: int) -> None:
        super()._forget_root(root)
        self._seeds.pop(root, None)

    # ---- recency -------------------------------------------------------------

    def use(self, rows: Rows) -> None:
        """See PathTable."""
        loops.use(self._arrays, rows, self.now, self._policy, self._window)

    def record(self, rows: Rows, request: int, priority: int, interval: int) -> None:
        """See PathTable."""
        rank, now = self.priority_rank(priority), self.now
        policy, window = self._policy, self._window
        loops.record(self._arrays, rows, request, rank, now, policy, window, interval)
