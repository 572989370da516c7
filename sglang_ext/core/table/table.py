"""The page table: one row is one page of one prefix, all state in columns.

A row never splits, merges or changes its parent, so the path of a row is fixed
for the row's life. That is why a lock, a transfer or a request may keep row
numbers across any number of inserts.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import candidates as loops
from sglang_ext.core.compiled.constants import (
    FREE,
    INSIDE_BAND,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_RANK,
    MAX_TICK,
    NO_REQUEST,
    PAD,
    RANK_SHIFT,
    TICK_SHIFT,
    UNUSED_BAND,
)
from sglang_ext.core.eviction_policy import (
    MOST_USES,
    Rank,
    Uses,
    expected_uses,
    lru,
    priority,
)
from sglang_ext.core.storage.keys import Key, as_array, chain, namespace_seed
from sglang_ext.core.table.columns import Rows, SlotColumn, resident_zeros
from sglang_ext.core.table.digest import PageHasher, Pages
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.priority_ranks import PriorityRanks

_FIRST_ROOT = -2
"""Parent of a first page is ``_FIRST_ROOT - namespace id``."""
STORING, STORED = 1, 2
_ALL = slice(None)
_GALLOP = 32


def consecutive(first: int, count: int) -> Rows:
    """Rows ``[first, first + count)``."""
    return np.arange(first, first + count, dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class AgeLimits:
    """What ages have bits for. Smaller in tests.

    Attributes:
        ticks: from the one that ages count from to now.
        ranks: the largest rank of a priority.
        pages: of the longest prefix.
    """

    ticks: int = MAX_TICK
    ranks: int = MAX_RANK
    pages: int = MAX_DEPTH + 1


NO_LESS = AgeLimits()


class PageTable:
    """Rows, the digest index over them, and four slot columns.

    Attributes:
        parent: (rows,) int32, parent row; FREE, or the root of a namespace.
        depth: (rows,) int32, pages before this one.
        tokens: (rows, page_tokens) int64; multimodal placeholders do not fit int32.
        children: (rows,) int32, rows whose parent this is.
        age: (rows,) int64, orders full-attention eviction: smaller goes first.
            Later access is larger, if the policy does not rank it lower, and on one
            path deeper is smaller, so a selection by age is leaf-first.
        swa_age: (rows,) int64, the same for sliding-window copies.
        hits: (rows,) int32, requests that have used the page; MAX_COUNT for more.
        forks: (rows,) int32, how often a request went on from here for itself after another
            had gone on from here: what a prefix that many share has, and the end of a
            conversation has not.
        priority: (rows,) int32, rank of the largest priority among them, see ``PriorityRanks``.
        resume: (rows,) bool, the window that ends with this page is worth keeping.
        resume_if_room: (rows,) bool, it is worth a copy as long as that takes nothing away.
        stored, window_stored: (rows,) int8, whether storage has the page: 0, STORING, STORED.
        keys: (rows, slots_per_page, 32) uint8, keys in storage, where ``keyed``.
        seed: what the keys of a namespace begin with.
        device, host: the columns of full-attention copies.
        swa_device, swa_host: the columns of sliding-window copies.
        tick: logical clock; goes on for ever, ages count from a later start now and then.
        when_renumbered: called when ages have changed without a use.
    """

    column_type: type[SlotColumn] = SlotColumn

    def __init__(
        self, geometry: Geometry, capacity: int, rank: Rank = lru, limits: AgeLimits = NO_LESS
    ) -> None:
        assert 2 * capacity < limits.ticks, f"ages cannot order {capacity} rows"
        self.geometry = geometry
        self.capacity = capacity
        self.parent: NDArray[np.int32] = np.full(capacity, FREE, dtype=np.int32)
        self.depth = resident_zeros(capacity, np.int32)
        self.digest = resident_zeros(capacity, np.uint64)
        self.tokens: Pages = resident_zeros((capacity, geometry.page_tokens), np.int64)
        self.children = resident_zeros(capacity, np.int32)
        self.generation = resident_zeros(capacity, np.int32)
        self.age = resident_zeros(capacity, np.int64)
        self.swa_age = resident_zeros(capacity, np.int64)
        self.hits = resident_zeros(capacity, np.int32)
        self.forks = resident_zeros(capacity, np.int32)
        self.priority = resident_zeros(capacity, np.int32)
        self.resume = resident_zeros(capacity, np.bool_)
        self.resume_if_room = resident_zeros(capacity, np.bool_)
        self.stored = resident_zeros(capacity, np.int8)
        self.window_stored = resident_zeros(capacity, np.int8)
        self.keyed = resident_zeros(capacity, np.bool_)
        self.keys = np.zeros((0, geometry.slots_per_page, 32), dtype=np.uint8)
        self._key_seed: Callable[[Hashable], Key] = namespace_seed
        self._last_request = resident_zeros(capacity, np.int64)
        slots = geometry.slots_per_page
        self.device = self.column_type(capacity, slots)
        self.host = self.column_type(capacity, slots)
        self.swa_device = self.column_type(capacity, slots)
        self.swa_host = self.column_type(capacity, slots)
        self.n_rows = 0
        self.tick = self._first_tick = 0
        self.when_renumbered: list[Callable[[], None]] = []
        self._rank = rank
        self._limits = limits
        self._priorities = PriorityRanks(limits.ranks)
        self._hasher = PageHasher(geometry.page_tokens)
        self._index: dict[int, int] = {}
        self._roots: dict[Hashable, int] = {}
        self._namespaces: dict[int, Hashable] = {}
        self._root_rows: dict[int, int] = {}
        self._next_root = 0
        self._cursor = 0
        self._ascending = consecutive(0, capacity + 1)

    # ---- lookup --------------------------------------------------------------

    def lookup(self, pages: Pages, namespace: Hashable) -> Rows:
        """Rows of the longest stored prefix of ``pages`` (n, page_tokens). Read-only.

        Rows of one insert are consecutive, so a run of rows is compared with the
        prompt in one statement; the digest index is asked only where a run ends.
        """
        root = self._roots.get(namespace)
        if root is None:
            return consecutive(0, 0)
        parent, digest, depth = root, self._hasher.seed(root), 0
        runs: list[Rows] = []
        while depth < len(pages):
            row = self._index.get(self._hasher.one(digest, pages[depth], depth))
            if row is None or self.parent[row] != parent:
                break
            count = self._common_run(row, pages[depth:])
            if count == 0:
                break
            runs.append(self._ascending[row : row + count])
            depth += count
            parent = row + count - 1
            digest = int(self.digest[parent])
        if len(runs) == 1:
            return runs[0]
        return np.concatenate(runs) if runs else consecutive(0, 0)

    def _common_run(self, row: int, pages: Pages) -> int:
        """Pages shared by ``pages`` and the run of consecutive rows from ``row``."""
        total, step = 0, _GALLOP
        limit = min(len(pages), self.capacity - row)
        while total < limit:
            stop = min(limit, total + step)
            # rows [row + total, row + stop) continue the run while each one's
            # parent is the row before it; the first row is known to fit
            low = max(total, 1)
            above = self._ascending[row + low - 1 : row + stop - 1]
            chained = self.parent[row + low : row + stop] == above
            if not chained.all():
                stop = low + int(chained.argmin())
                limit = stop
            differs = self.tokens[row + total : row + stop] != pages[total:stop]
            if differs.any():
                return total + int(differs.argmax()) // self.geometry.page_tokens
            total, step = stop, step * 8
        return total

    def inside(
        self, parent: int, page: NDArray[np.int64], *, usable: bool = True
    ) -> tuple[int, int]:
        """The child of a row, or of the root of a namespace, that begins as a page does.

        Siblings are kept as a treap: a search tree by tokens that is a heap by digest, so its
        shape follows from what is in it. What is nearest to the page is on the way down to
        where the page would be; here the way is walked by that definition.

        Args:
            page: (page_tokens,) tokens, from some token on PAD.
            usable: leave out pages without a window on any tier.

        Returns:
            (row, tokens in common, in whole device pages); (-1, 0) if there is none.
        """
        rows = np.flatnonzero(self.parent == parent).tolist()
        best, most, best_is_here, wanted = -1, 0, False, page.tolist()
        while rows:
            top = max(rows, key=lambda row: int(self.digest[row]))
            tokens = self.tokens[top].tolist()
            same = [a == b != PAD for a, b in zip(tokens, wanted, strict=True)]
            shared = same.index(False) if False in same else len(same)
            shared -= shared % self.geometry.device_page
            here = bool(self.device.present[top] and self.swa_device.present[top])
            there = bool(self.swa_device.present[top] or self.swa_host.ready[top])
            if (there or not usable) and (shared, here) > (most, best_is_here) and shared:
                best, most, best_is_here = top, shared, here
            if tokens == wanted:
                break
            goes_up = tokens < wanted
            rows = [
                row
                for row in rows
                if row != top and (tokens < self.tokens[row].tolist()) == goes_up
            ]
        return best, most

    def exact(self, above: Rows, page: NDArray[np.int64], namespace: Hashable) -> int | None:
        """The row of a page below a path, whether a tail or a whole page."""
        root = self._roots.get(namespace)
        if root is None:
            return None
        parent = int(above[-1]) if len(above) else root
        digest = int(self.digest[parent]) if len(above) else self._hasher.seed(root)
        row = self.row_of(self._hasher.one(digest, page, len(above)))
        if row is None or self.parent[row] != parent or (self.tokens[row] != page).any():
            return None
        return row

    def root(self, namespace: Hashable) -> int | None:
        """Parent of the first pages of a namespace; None if it has no pages."""
        return self._roots.get(namespace)

    def is_tail(self, row: int) -> bool:
        """Whether a row is a page that is not whole: the end of a request."""
        return bool(self.tokens[row, -1] == PAD)

    def row_of(self, digest: int) -> int | None:
        """The row in the index under a digest."""
        return self._index.get(digest)

    def n_indexed(self) -> int:
        """Rows in the index."""
        return len(self._index)

    def is_current(self, row: int, generation: int) -> bool:
        """Whether ``row`` still is the page it was when ``generation`` was read."""
        return bool(self.parent[row] != FREE) and int(self.generation[row]) == generation

    def path(self, row: int) -> Rows:
        """Rows from the first page to ``row``."""
        rows: Rows = np.empty(int(self.depth[row]) + 1, dtype=np.int64)
        loops.path(self.parent, row, rows)
        return rows

    def namespace(self, path: Rows) -> Hashable:
        """Namespace of a path that is not empty."""
        return self._namespaces[int(self.parent[path[0]])]

    def name_namespaces(self, seed: Callable[[Hashable], Key]) -> None:
        """Let the keys of a namespace begin with something else; before there are any."""
        self._key_seed = seed

    def seed(self, namespace: Hashable) -> Key:
        """What the keys of a namespace begin with."""
        return self._key_seed(namespace)

    def storage_keys(self, path: Rows) -> list[Key]:
        """Keys in storage of the device pages of a path, which begins with a first page."""
        if len(path) == 0:
            return []
        if len(self.keys) == 0:
            self.keys = np.zeros((self.capacity, *self.keys.shape[1:]), dtype=np.uint8)
        known = int(np.count_nonzero(self.keyed[path]))
        if known < len(path):
            # a page has its key only if the one before it has: rows[known:] have none
            before = self.seed(self.namespace(path))
            if known:
                before = self.keys[path[known - 1], -1].tobytes()
            per_page = self.geometry.slots_per_page
            self.set_keys(path[known:], chain(before, self.tokens[path[known:]], per_page))
        text = self.keys[path].tobytes()
        return [text[i : i + 32] for i in range(0, len(text), 32)]

    def set_keys(self, rows: Rows, keys: Sequence[Key]) -> None:
        """Note the keys of rows, whose parents have theirs."""
        if len(self.keys) == 0:
            self.keys = np.zeros((self.capacity, *self.keys.shape[1:]), dtype=np.uint8)
        self.keys[rows] = as_array(keys, self.geometry.slots_per_page)
        self.keyed[rows] = True

    # ---- rows ----------------------------------------------------------------

    def add_rows(self, above: Rows, pages: Pages, namespace: Hashable) -> Rows:
        """Append ``pages`` (n, page_tokens) as new rows below the path ``above``.

        Returns the new rows, fewer than n where a digest is already taken by
        another prefix (a collision), the table has no free row, or the prefix is
        longer than ages can order. New rows have no copy yet; the caller must
        give each one.
        """
        pages = pages[: self._limits.pages - len(above)]
        root = self._root_of(namespace)
        parent = int(above[-1]) if len(above) else root
        digest = int(self.digest[parent]) if len(above) else self._hasher.seed(root)
        depth = len(above)
        digests = self._hasher.many(digest, pages, depth)
        keys = digests.tolist()
        count = len(keys)
        if not self._index.keys().isdisjoint(keys) or len(set(keys)) < count:
            count = self._first_taken(keys)
        rows = self._free_rows(count)
        count = len(rows)
        if count == 0:
            self._drop_empty_root(namespace)
            return rows
        self._index.update(zip(keys[:count], rows.tolist(), strict=True))
        self.parent[rows] = np.concatenate(([parent], rows[:-1]))
        self.depth[rows] = self._ascending[depth : depth + count]
        self.digest[rows] = digests[:count]
        self.tokens[rows] = pages[:count]
        self.children[rows] = 1
        self.children[rows[-1]] = 0
        self.swa_age[rows] = UNUSED_BAND + self._ages(rows)
        self.hits[rows] = 0
        self.forks[rows] = 0
        self.priority[rows] = 0
        self.resume[rows] = False
        self.stored[rows] = 0
        self.window_stored[rows] = 0
        self.keyed[rows] = False
        self._last_request[rows] = NO_REQUEST
        self.n_rows += count
        if len(above):
            shared = self.hits[parent] > 1 or self.children[parent] > 0
            self.forks[parent] += shared and self.forks[parent] < MAX_COUNT
            self.children[parent] += 1
        else:
            self._root_rows[root] += 1
        return rows

    def remove_rows(self, rows: Rows) -> None:
        """Forget rows that have no full-attention copy and no child left outside.

        A child inside ``rows`` is fine. Copies must have been taken before.
        """
        for key in self.digest[rows].tolist():
            del self._index[key]
        parents = self.parent[rows]
        inner = parents[parents >= 0]
        np.subtract.at(self.children, inner, 1)
        for root in parents[parents < 0].tolist():
            self._leave_root(root)
        assert not self.children[rows].any(), "removed a row that still has children"
        self.parent[rows] = FREE
        self.generation[rows] += 1
        self.resume_if_room[rows] = False
        self.n_rows -= len(rows)

    def _first_taken(self, keys: list[int]) -> int:
        seen: set[int] = set()
        for i, key in enumerate(keys):
            if key in self._index or key in seen:
                return i
            seen.add(key)
        return len(keys)

    def _free_rows(self, count: int) -> Rows:
        """Up to ``count`` unused rows, ascending where possible: next fit."""
        found: list[Rows] = []
        missing, start = count, self._cursor
        scanned, step = 0, max(4 * count, 1024)
        while missing > 0 and scanned < self.capacity:
            stop = min(start + step, self.capacity, start + self.capacity - scanned)
            rows = np.flatnonzero(self.parent[start:stop] == FREE)[:missing] + start
            scanned += stop - start
            if len(rows):
                found.append(rows)
                missing -= len(rows)
                self._cursor = int(rows[-1]) + 1
            start = 0 if stop == self.capacity else stop
        if self._cursor >= self.capacity:
            self._cursor = 0
        return np.concatenate(found) if found else consecutive(0, 0)

    # ---- namespaces ----------------------------------------------------------

    def _root_of(self, namespace: Hashable) -> int:
        root = self._roots.get(namespace)
        if root is None:
            root = _FIRST_ROOT - self._next_root
            self._next_root += 1
            self._roots[namespace] = root
            self._namespaces[root] = namespace
            self._root_rows[root] = 0
        return root

    def _drop_empty_root(self, namespace: Hashable) -> None:
        root = self._roots[namespace]
        if self._root_rows[root] == 0:
            self._forget_root(root)

    def _leave_root(self, root: int) -> None:
        """A first page of the namespace is gone."""
        self._root_rows[root] -= 1
        if self._root_rows[root] == 0:
            self._forget_root(root)

    def _forget_root(self, root: int) -> None:
        # a namespace lives as long as it has pages: salts must not pile up
        del self._roots[self._namespaces.pop(root)]
        del self._root_rows[root]

    # ---- recency -------------------------------------------------------------

    def advance(self) -> int:
        """Next tick of the logical clock."""
        self._set_tick(self.tick + 1)
        return self.tick

    def _set_tick(self, tick: int) -> None:
        self.tick = tick
        if tick - self._first_tick >= self._limits.ticks:
            self.renumber()

    @property
    def now(self) -> int:
        """The tick as ages have it."""
        return self.tick - self._first_tick

    def renumber(self) -> None:
        """Make room in ages, which have bits for so many ticks and ranks and no more. O(rows), and
        as rare as many ticks pass, or many different priorities come.

        The order stays the same. So do distances between recent ticks; ticks long ago move
        together. Ranks of priorities move apart.
        """
        used = np.flatnonzero(self.parent != FREE)
        renamed = np.arange(MAX_RANK + 1)
        if self._rank is priority:
            spread = self._priorities.spread(np.unique(self.priority[used]))
            renamed[: len(spread)] = spread
            self.priority[used] = renamed[self.priority[used]]
        recent = (self._limits.ticks - self.capacity) // 2
        shift = max(0, self.now - recent - self.capacity)
        if shift:
            swa_age = self.swa_age[used]
            band = np.where(swa_age < INSIDE_BAND, UNUSED_BAND, (swa_age < 0) * INSIDE_BAND)
            self.swa_age[used] = band + self._since(shift, swa_age - band)
        age = self.age[used]
        rank = renamed[age >> RANK_SHIFT]
        within = self._since(shift, age & ((1 << RANK_SHIFT) - 1))
        self.age[used] = (rank << RANK_SHIFT) + within
        self._first_tick += shift
        for told in self.when_renumbered:
            told()

    def _since(self, shift: int, ages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ages without a rank if they count from ``shift`` ticks later. What was before fits in as
        many ticks as there are rows, for no row has more than one."""
        if shift == 0:
            return ages
        ticks = ages >> TICK_SHIFT
        long_ago = ticks < shift + self.capacity
        different, place = np.unique(ticks[long_ago], return_inverse=True)
        moved = ticks - shift
        moved[long_ago] = self.capacity - len(different) + place
        return ages + ((moved - ticks) << TICK_SHIFT)

    def touch(self, rows: Rows) -> None:
        """Make pages of one path the most recently used ones for full attention."""
        uses = Uses(self.hits[rows], self.priority[rows])
        self.age[rows] = (self._rank(uses) << RANK_SHIFT) + self._ages(rows)

    def touch_window(self, rows: Rows) -> None:
        """The same for sliding-window copies; only the window that is used."""
        self.swa_age[rows] = self._ages(rows)

    def keep_inside(self, rows: Rows) -> None:
        """Rank the pages of a window inside a prompt above those that are worth nothing."""
        worthless = rows[self.swa_age[rows] < INSIDE_BAND]
        self.swa_age[worthless] += INSIDE_BAND - UNUSED_BAND

    def count_request(self, rows: Rows, request: int, requested: int = 0) -> bool:
        """Count a request on pages of its path; whether it was new to one of them. In pieces,
        or again with no other request in between, it counts once.

        Args:
            request: identifies the request; not NO_REQUEST.
            requested: its priority, any 64-bit number; larger is more important.
        """
        rank = self.priority_rank(requested)
        self.priority[rows] = np.maximum(self.priority[rows], rank)
        new = rows[self._last_request[rows] != request]
        self.hits[new] += self.hits[new] < MAX_COUNT
        self._last_request[new] = request
        return len(new) > 0

    def priority_rank(self, requested: int) -> int:
        """Rank of the priority of a request; 0 if the eviction policy does not look at it."""
        if self._rank is not priority:
            return 0
        ranks = self._priorities
        rank = ranks.of(requested)
        if rank is None and ranks.is_time_to_spread():
            self.renumber()
            rank = ranks.of(requested)
        return ranks.share(requested) if rank is None else rank

    def worth(self, rows: Rows) -> NDArray[np.float64]:
        """What the prefixes that end with these pages are worth, see ``expected_uses``: larger
        is more, first of all by the rank of the eviction policy."""
        rank = self.age[rows] >> RANK_SHIFT
        return rank * MOST_USES + expected_uses(self.forks[rows], self.tick - self.last_use(rows))

    def last_use(self, rows: Rows | slice = _ALL) -> NDArray[np.int64]:
        """Ticks in which pages were last used; of all rows unless told."""
        within = self.age[rows] & ((1 << RANK_SHIFT) - 1)
        return self._first_tick + (within >> TICK_SHIFT)

    def window_idle(self, rows: Rows) -> NDArray[np.int64]:
        """Ticks since the windows that end with these pages were used; far more than any for
        those in the lower bands."""
        return self.now - (self.swa_age[rows] >> TICK_SHIFT)

    def _ages(self, rows: Rows) -> NDArray[np.int64]:
        return (self.now << TICK_SHIFT) + (MAX_DEPTH - self.depth[rows].astype(np.int64))
