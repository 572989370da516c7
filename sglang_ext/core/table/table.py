"""The page table: one row is one page of one prefix, all state in columns.

A row never splits, merges or changes its parent, so the path of a row is fixed
for the row's life. That is why a lock, a transfer or a request may keep row
numbers across any number of inserts.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.arrays import FIELDS, Columns, addresses
from sglang_ext.core.compiled.constants import (
    EMPTY_BUCKET,
    FREE,
    INSIDE_BAND,
    MAX_DEPTH,
    MAX_RANK,
    MAX_TICK,
    PAD,
    RANK_SHIFT,
    TICK_SHIFT,
    UNUSED_BAND,
)
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.compiled.returns import CLASSES
from sglang_ext.core.eviction_policy import EvictionPolicy
from sglang_ext.core.plan import PrefixMatch
from sglang_ext.core.storage.keys import Key, as_array, chain, namespace_seed
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.digest import Pages, page_weights
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.namespaces import Namespaces
from sglang_ext.core.table.paths import Page
from sglang_ext.core.table.priority_ranks import PriorityRanks
from sglang_ext.core.table.prospects import PastUses, Prospects
from sglang_ext.core.table.row_memory import RowMemory
from sglang_ext.core.table.window import near_end

STORING, STORED = 1, 2
_ALL = slice(None)
_BUCKETS_PER_ROW = 2
_STAY_SHARE = 8
"""Of the ticks of ages one in so many may lie ahead."""
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NOTHING = PrefixMatch(_NO_ROWS, 0, 0)


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


def _room(pages: Pages, rest: Page) -> Rows:
    """What a match writes to where it may end inside a page, see ``loops.match``."""
    count = len(pages) + 1
    if len(rest) == 0:
        return np.empty(count, np.int64)
    room = np.empty(count + len(rest), np.int64)
    room[count:] = rest
    return room


class PageTable:
    """Rows, the digest index over them, and four slot columns.

    Attributes:
        parent: (rows,) int32, parent row; FREE, or the root of a namespace.
        depth: (rows,) int32, pages before this one.
        tokens: (rows, name_tokens) int64, what pages are named by, see ``Geometry``; multimodal
            placeholders do not fit int32.
        children: (rows,) int32, rows whose parent this is.
        space: (rows,) int32, number of the namespace, see ``Namespaces``.
        age: (rows,) int64, orders full-attention eviction: smaller goes first.
            Later access is larger, if the policy does not rank it lower, and on one
            path deeper is smaller, so a selection by age is leaf-first. With the learned
            policy its tick is not that of the last use, but when the page expires.
        swa_age: (rows,) int64, the same for sliding-window copies.
        hits: (rows,) int32, requests that have used the page; MAX_COUNT for more.
        forks: (rows,) int32, how often a request went on from here for itself after another
            had gone on from here: what a prefix that many share has, and the end of a
            conversation has not.
        priority: (rows,) int32, rank of the largest priority among them, see ``PriorityRanks``;
            with TLRU the most pages that one of their prefixes needs, with SESSIONS how many
            open sessions have used the page.
        kind: (rows,) int8, class of the page; UNKNOWN until a request has ended that used it.
        used: (rows,) int64, requests that had ended with the last such one, or when it came.
        stay: (classes,) int64, ticks from its use until a page of that class expires.
        resume: (rows,) bool, the window that ends with this page is worth keeping.
        resume_if_room: (rows,) bool, it is worth a copy as long as that takes nothing away.
        stored, window_stored: (rows,) int8, whether storage has the page: 0, STORING, STORED.
        keys: (rows, slots_per_page, 32) uint8, keys in storage, where ``keyed``.
        seed: what the keys of a namespace begin with.
        namespaces: those that have pages.
        device, host: the columns of full-attention copies.
        swa_device, swa_host: the columns of sliding-window copies.
        tick: logical clock; goes on for ever, ages count from a later start now and then.
        prospects: what prefixes are worth to the host.
        when_renumbered: called when ages have changed without a use.
        loops: compiled or interpreted.

    Args:
        memory: of a table before, which nobody uses any more.
        spare_pages: with TLRU, pages at the end of a prefix that it does not need.
    """

    def __init__(
        self,
        geometry: Geometry,
        capacity: int,
        policy: EvictionPolicy = EvictionPolicy.LRU,
        limits: AgeLimits = NO_LESS,
        loops: Loops = COMPILED,
        memory: RowMemory | None = None,
        spare_pages: int = 0,
    ) -> None:
        assert 2 * capacity < limits.ticks, f"ages cannot order {capacity} rows"
        self.geometry = geometry
        self.capacity = capacity
        self._memory = memory = memory or RowMemory()
        zeros = memory.zeros
        self.parent: NDArray[np.int32] = np.full(capacity, FREE, dtype=np.int32)
        self.depth = zeros("depth", capacity, np.int32)
        self.digest = zeros("digest", capacity, np.uint64)
        self.tokens: Pages = zeros("tokens", (capacity, geometry.name_tokens), np.int64)
        self.children = zeros("children", capacity, np.int32)
        self.space = zeros("space", capacity, np.int32)
        self.generation = zeros("generation", capacity, np.int32)
        self.age = zeros("age", capacity, np.int64)
        self.swa_age = zeros("swa_age", capacity, np.int64)
        self.hits = zeros("hits", capacity, np.int32)
        self.forks = zeros("forks", capacity, np.int32)
        self.priority = zeros("priority", capacity, np.int32)
        self.kind = zeros("kind", capacity, np.int8)
        self.used = zeros("used", capacity, np.int64)
        self.stay = np.zeros(CLASSES, dtype=np.int64)
        self.resume = zeros("resume", capacity, np.bool_)
        self.resume_if_room = zeros("resume_if_room", capacity, np.bool_)
        self.stored = zeros("stored", capacity, np.int8)
        self.window_stored = zeros("window_stored", capacity, np.int8)
        self.keyed = zeros("keyed", capacity, np.bool_)
        self.keys = np.zeros((0, geometry.slots_per_page, 32), dtype=np.uint8)
        self._key_seed: Callable[[Hashable], Key] = namespace_seed
        slots = geometry.slots_per_page
        self.loops, self._paths = loops, loops.paths
        self.device = SlotColumn(capacity, slots, loops)
        self.host = SlotColumn(capacity, slots, loops)
        self.swa_device = SlotColumn(capacity, slots, loops)
        self.swa_host = SlotColumn(capacity, slots, loops)
        self.n_rows = self._cursor = self.tick = self._first_tick = 0
        self.when_renumbered: list[Callable[[], None]] = []
        self._stored_changed: Callable[[Rows], None] | None = None
        self._by_priority = policy is EvictionPolicy.PRIORITY
        self._policy, self._spare_pages = int(policy), spare_pages
        self.prospects: Prospects = PastUses(self)
        self._window = geometry.window_pages
        self._limits = limits
        self._most_ticks = limits.ticks - self.longest_stay
        self._priorities = PriorityRanks(limits.ranks)
        self.namespaces = Namespaces()
        self._roots, self._seeds = self.namespaces.roots, self.namespaces.seeds
        # what loops get as a table; nobody replaces one of these arrays
        self._columns = self._all_columns()
        memory.begin()
        self._addresses = addresses(self._columns)
        self._arrays = loops.table(self._columns, self._addresses)

    def _all_columns(self) -> Any:
        zeros = self._memory.zeros
        buckets = 1 << max(1, (_BUCKETS_PER_ROW * self.capacity - 1).bit_length())
        of_others = {
            "last_request": zeros("last_request", self.capacity, np.int64),
            "device": self.device.present,
            "swa_device": self.swa_device.present,
            "swa_locks": self.swa_device.locks,
            "swa_host_ready": self.swa_host.ready,
            "buckets": np.full(buckets, EMPTY_BUCKET, dtype=np.uint64),
            "weights": page_weights(self.geometry.name_tokens),
            "links": np.full((self.capacity + 1, 4), (-1, -1, -1, 0), dtype=np.int32),
            "device_page": self.geometry.device_page,
            "overlap": self.geometry.overlap,
        }
        own = {name: getattr(self, name) for name in FIELDS if name not in of_others}
        return Columns(**own, **of_others)

    # ---- lookup --------------------------------------------------------------

    def lookup(self, pages: Pages, namespace: Hashable) -> Rows:
        """Rows of the longest stored prefix of ``pages`` (n, name_tokens). Read-only.

        Rows of one insert are consecutive, so the digest index is asked only where a run of
        them ends.
        """
        root = self._roots.get(namespace)
        if root is None:
            return _NO_ROWS
        rows = np.empty(len(pages), dtype=np.int64)
        return rows[: self._paths.lookup(self._arrays, pages, root, self._seeds[root], rows)]

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """Best resume point for a prompt of ``pages`` (n, name_tokens). Read-only.

        Args:
            rest: (n,) tokens that name what follows the pages, less than a page; None for a
                request that must not resume inside a page.
        """
        root = self._roots.get(namespace)
        if root is None:
            return _NOTHING
        rows = np.empty(len(pages), np.int64) if rest is None else _room(pages, rest)
        behind, best, ready, to_pin, cut = self._paths.match(
            self._arrays, pages, root, self._seeds[root], self._window, rows
        )
        return PrefixMatch(rows[:best], ready, to_pin, behind, cut)

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """``match``, and ``use`` of a path that is found, in a tick of its own."""
        root = self._roots.get(namespace)
        if root is None:
            return _NOTHING
        # what most requests wait for: no call that is not needed
        rows = np.empty(len(pages), np.int64) if rest is None else _room(pages, rest)
        tick = self.tick + 1
        behind, best, ready, to_pin, cut = self._paths.match_and_use(
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
        """The child of a row, or of the root of a namespace, that begins as a page does.

        Siblings are kept as a treap: a search tree by tokens that is a heap by digest, so its
        shape follows from what is in it. What is nearest to the page is on the way down to
        where the page would be.

        Args:
            page: (name_tokens,) tokens, from some token on PAD.
            usable: leave out pages without a window on any tier.

        Returns:
            (row, positions in common, in whole device pages); (-1, 0) if there is none.
        """
        row, shared = self.loops.siblings.inside(self._arrays, parent, page[None], usable)
        return int(row), int(shared)

    def below(self, parent: int) -> Rows:
        """All rows below a row, or of the namespace of a root, each behind its parent. O(those)."""
        rows = np.empty(self.n_rows, dtype=np.int64)
        return rows[: self.loops.siblings.below(self._arrays, parent, rows)]

    def exact(self, above: Rows, page: Page, namespace: Hashable) -> int | None:
        """The row of a page below a path, whether a tail or a whole page."""
        root = self._roots.get(namespace)
        if root is None:
            return None
        parent, digest = self._end_of(above, root)
        row = self._paths.child(self._arrays, page[None], parent, digest, len(above))
        return None if row < 0 else int(row)

    def _end_of(self, path: Rows, root: int) -> tuple[int, int]:
        """Parent of what follows a path, and the digest of the path."""
        if len(path) == 0:
            return root, self._seeds[root]
        return int(path[-1]), int(self.digest[path[-1]])

    def root(self, namespace: Hashable) -> int | None:
        """Parent of the first pages of a namespace; None if it has no pages."""
        return self._roots.get(namespace)

    def is_tail(self, row: int) -> bool:
        """Whether a row is a page that is not whole: the end of a request."""
        return bool(self.tokens[row, -1] == PAD)

    def row_of(self, digest: int) -> int | None:
        """The row in the index under a digest."""
        row = self.loops.digests.find(self._columns.buckets, self.digest, digest)
        return None if row < 0 else int(row)

    def n_indexed(self) -> int:
        """Rows in the index."""
        return int(np.count_nonzero(self._columns.buckets != EMPTY_BUCKET))

    def is_current(self, row: int, generation: int) -> bool:
        """Whether ``row`` still is the page it was when ``generation`` was read."""
        return bool(self.parent[row] != FREE) and int(self.generation[row]) == generation

    def path(self, row: int) -> Rows:
        """Rows from the first page to ``row``."""
        rows = np.empty(int(self.depth[row]) + 1, dtype=np.int64)
        self._paths.path(self._arrays, row, rows)
        return rows

    def prompt(self, path: Rows) -> Page:
        """Tokens that name the pages of a path that is not empty, each of them once."""
        own = self.tokens[path, : self.geometry.page_tokens].reshape(-1)
        shared: Page = self.tokens[path[-1], self.geometry.page_tokens :]
        return np.concatenate((own, shared)) if len(shared) else own

    def namespace(self, path: Rows) -> Hashable:
        """Namespace of a path that is not empty."""
        return self.namespaces.names[int(self.parent[path[0]])]

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
            self.set_keys(path[known:], chain(before, self.tokens[path[known:]], self.geometry))
        text = self.keys[path].tobytes()
        return [text[i : i + 32] for i in range(0, len(text), 32)]

    def set_keys(self, rows: Rows, keys: Sequence[Key]) -> None:
        """Note the keys of rows, whose parents have theirs."""
        if len(self.keys) == 0:
            self.keys = np.zeros((self.capacity, *self.keys.shape[1:]), dtype=np.uint8)
        self.keys[rows] = as_array(keys, self.geometry.slots_per_page)
        self.keyed[rows] = True

    def note_stored(self, rows: Rows, state: int) -> None:
        """Storage has pages, is to get them (STORING), or has not (0)."""
        self.stored[rows] = state
        if self._stored_changed is not None:
            self._stored_changed(rows)

    def forget_stored(self) -> None:
        """Storage has nothing any more but what it is to get. O(rows)."""
        if self._stored_changed is not None:
            self._stored_changed(np.flatnonzero(self.stored == STORED))
        # of a byte for each row, so many at a time that looking at all of them takes no time
        for state in (self.stored, self.window_stored):
            np.bitwise_and(state, STORING, out=state)

    def tell_stored(self, changed: Callable[[Rows], None]) -> None:
        """Call somebody with the rows that storage may have got or lost."""
        self._stored_changed = changed

    # ---- rows ----------------------------------------------------------------

    def add_rows(self, above: Rows, pages: Pages, namespace: Hashable) -> Rows:
        """Append ``pages`` (n, name_tokens) as new rows below the path ``above``.

        Returns the new rows, fewer than n where a digest is already taken by
        another prefix (a collision), the table has no free row, or the prefix is
        longer than ages can order. New rows have no copy yet; the caller must
        give each one.
        """
        namespaces = self.namespaces
        root = namespaces.root_of(namespace)
        depth = len(above)
        pages = pages[: self._limits.pages - depth]
        parent, digest = self._end_of(above, root)
        rows = np.empty(len(pages), dtype=np.int64)
        first = self._cursor
        count, self._cursor = self._paths.append(
            self._arrays,
            pages,
            parent,
            digest,
            depth,
            self.now,
            self.prospects.requests_ended,
            namespaces.numbers[root],
            self._cursor,
            rows,
        )
        if count:
            self._memory.note(first, self._cursor, self.capacity)
        self.n_rows += int(count)
        if count == 0:
            namespaces.close_if_empty(root)
        elif depth == 0:
            namespaces.note_first_page(root)
        return rows[:count]

    def remove_rows(self, rows: Rows) -> None:
        """Forget rows that have no full-attention copy and no child left outside.

        A child inside ``rows`` is fine. Copies must have been taken before.
        """
        roots = np.empty(len(rows), dtype=np.int64)
        first = self._paths.remove(self._arrays, rows, roots)
        assert first >= 0, "removed a row that still has children"
        self.n_rows -= len(rows)
        for root in roots[:first].tolist():
            self.namespaces.leave(root)

    # ---- recency -------------------------------------------------------------

    @property
    def is_learned(self) -> bool:
        """Whether pages expire: ``kind``, ``used`` and ``stay`` count."""
        return self._policy == EvictionPolicy.LEARNED

    @property
    def longest_stay(self) -> int:
        """Ticks from a use until a page expires, at most."""
        return self._limits.ticks // _STAY_SHARE if self.is_learned else 0

    def advance(self) -> int:
        """Next tick of the logical clock."""
        self._set_tick(self.tick + 1)
        return self.tick

    def _set_tick(self, tick: int) -> None:
        self.tick = tick
        if tick - self._first_tick >= self._most_ticks:
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
        if self._by_priority:
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

    def use(self, rows: Rows) -> None:
        """Make the pages of a path, and the window at its end, those used last."""
        self._paths.use(self._arrays, rows, self.now, self._policy, self._window)

    def use_window(self, rows: Rows) -> None:
        """Make sliding-window copies those used last, alone."""
        self._paths.use_window(self._arrays, rows, self.now)

    def keep_windows_near_end(self, path: Rows, *, copy_one: bool) -> None:
        """A prompt has ended: windows near its end go with their pages and after others inside
        prompts.

        Args:
            copy_one: one of them is worth a copy, since the next prompt often goes on from
                somewhere before the end: a template renders the last words anew, or somebody
                edits them.
        """
        pages, apart = near_end(self.geometry)
        near = path[-pages:]
        near = near[self.swa_device.present[near] & (self.swa_age[near] < 0)]
        self.swa_age[near] = np.maximum(self.swa_age[near], INSIDE_BAND + self.age[near])
        if not copy_one:
            return
        window = path[: (len(path) - 1) // apart * apart][-self._window :]
        if len(window) and (self.swa_device.present[window] | self.swa_host.ready[window]).all():
            self.resume[window[-1]] = True

    def record(self, rows: Rows, request: int, priority: int, interval: int) -> None:
        """A request has extended a path, which is not empty: ``count_request`` and ``use`` of it,
        and which of its windows are worth keeping.

        Args:
            interval: pages between those inside a prompt, see ``windows.resume_points``.
        """
        rank, now = self._importance(rows, priority), self.now
        policy, window = self._policy, self._window
        self._paths.record(self._arrays, rows, request, rank, now, policy, window, interval)

    def count_request(self, rows: Rows, request: int, requested: int = 0) -> bool:
        """Count a request on pages of its path; whether it was new to one of them. In pieces,
        or again with no other request in between, it counts once.

        Args:
            request: identifies the request; not NO_REQUEST.
            requested: its priority, any 64-bit number; larger is more important.
        """
        rank = self._importance(rows, requested)
        return bool(self._paths.count_request(self._arrays, rows, request, rank))

    def _importance(self, path: Rows, requested: int) -> int:
        """What a request makes ``priority`` of a path at least."""
        if self._policy == EvictionPolicy.TLRU:
            return max(0, len(path) - self._spare_pages)
        return self.priority_rank(requested)

    def refer(self, rows: Rows, sessions: int) -> None:
        """So many more sessions, or fewer, have used pages, each with all pages before it on its
        path. When they were used does not change."""
        self.priority[rows] += sessions
        within = self.age[rows] & ((1 << RANK_SHIFT) - 1)
        self.age[rows] = within + ((self.priority[rows] > 0).astype(np.int64) << RANK_SHIFT)

    def priority_rank(self, requested: int) -> int:
        """Rank of the priority of a request; 0 if the eviction policy does not look at it."""
        if not self._by_priority:
            return 0
        ranks = self._priorities
        rank = ranks.of(requested)
        if rank is None and ranks.is_time_to_spread():
            self.renumber()
            rank = ranks.of(requested)
        return ranks.share(requested) if rank is None else rank

    def go_by(self, prospects: Prospects) -> None:
        """Somebody else tells what prefixes are worth."""
        self.prospects = prospects

    def last_use(self, rows: Rows | slice = _ALL) -> NDArray[np.int64]:
        """Ticks in which pages were last used, or in which they expire; of all rows unless told."""
        within = self.age[rows] & ((1 << RANK_SHIFT) - 1)
        return self._first_tick + (within >> TICK_SHIFT)

    def window_idle(self, rows: Rows) -> NDArray[np.int64]:
        """Ticks since the windows that end with these pages were used, or have expired, at least
        0; far more than any for those in the lower bands."""
        idle: NDArray[np.int64] = np.maximum(0, self.now - (self.swa_age[rows] >> TICK_SHIFT))
        return idle
