"""Room on the host: what gives way to a backup, and to which one."""

import dataclasses
import heapq
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.device.victims import cheapest_first, youngest_first
from sglang_ext.core.host.sampling import Sampling
from sglang_ext.core.host.space import SPARE, HostSpace
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.table import STORED, PageTable

_FEW = 16
"""Up to so many paths are walked one by one rather than a level at a time."""
_WINDOWS_DROPPED_SHARE = 16
"""Of windows that are worth little, one in this many goes at a time."""
_PAGES_DROPPED = 16
"""So many pages with descendants on the host alone go at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What needs room on the host.

    Attributes:
        age: of the youngest page.
        worth: of the prefixes that need it, the largest; see ``PageTable.worth``.
    """

    age: int
    worth: float

    @classmethod
    def of(cls, table: PageTable, path: Rows, pages: Rows) -> "Claim":
        """That of a backup of ``pages``, or of a window alone, on a path to a resume point."""
        if len(pages) == 0:
            pages = path[-1:]
        return cls(
            age=int(table.age[pages].max()),
            # who resumes below them needs them too
            worth=float(table.worth(path[int(table.depth[pages[0]]) :]).max()),
        )


NEEDED_NOW = Claim(age=-(1 << 62), worth=float("inf"))
"""What a request waits for takes the place of everything that only may be needed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Freed:
    """What came of it.

    Attributes:
        is_enough: there is as much room as was asked for.
        pages: that were dropped.
        copies_of_device: some of them were copies of what is on the device too, which may be
            what the device evicts next.
    """

    is_enough: bool
    pages: int = 0
    copies_of_device: bool = False


_ENOUGH = Freed(is_enough=True)


class HostRoom:
    """Frees host pages: decides what gives way."""

    def __init__(self, residency: Residency, sampling: Sampling) -> None:
        self._residency = residency
        self._table = residency.table
        self._host, self._host_window = residency.host, residency.host_window
        self._kept = residency.checkpoints
        self._counters = residency.counters
        self._sampling = sampling

    def make(self, space: HostSpace, pages: int, claim: Claim) -> Freed:
        """Free host pages of a component until there are ``pages``, as far as possible.

        First goes what costs least: windows that are kept only because there was room; copies
        that lead to no window on the host; copies of what is on the device too; then windows
        inside conversations that others near them make up for; then copies of what is on the
        device and has descendants on the host alone; then the ends of those prefixes that are
        worth least. Where both components share a memory, each gives way to the other.

        Args:
            claim: for what. Copies of what is on the device too give way only if they are
                younger, for they are needed later; what is on the host alone only if it is
                worth less.
        """
        if pages <= space.free_pages:
            return _ENOUGH
        copies, given = self._copies_of_device(), 0
        other = self._sharing(space)
        for drop in self._stages(space, other, pages, claim):
            while pages > space.free_pages:
                if other is not None and self.vacate(other):
                    continue
                if not (dropped := drop()):
                    break
                given += dropped
        fewer = self._copies_of_device() < copies
        return Freed(pages <= space.free_pages, given, copies_of_device=fewer)

    def make_without_loss(self, space: HostSpace, pages: int, *, recycle: bool) -> None:
        """Free host pages for a backup that is not needed yet: to it gives way only what nobody
        has asked for.

        Args:
            recycle: and, as there is storage, what is there and on the device too.
        """
        other = self._sharing(space)
        while self._kept.beyond and pages > space.free_for_copies(needed_now=False):
            if not ((other is not None and self.vacate(other)) or self.drop_spare()):
                break
        if recycle:
            self._recycle(space, pages)

    def _stages(
        self, space: HostSpace, other: HostSpace | None, pages: int, claim: Claim
    ) -> Iterator[Callable[[], int]]:
        """What gives way, one after the other; each returns what it has dropped."""
        tails = self.tails(claim.worth)
        yield self.drop_spare
        yield self._drop_useless
        yield lambda: self._drop_duplicates(space, pages - space.free_pages, claim.age)
        if other is not None:
            yield lambda: self._drop_duplicates(other, self._for_an_extent(other), claim.age)
        yield self._drop_superseded
        yield lambda: self._drop_duplicate_pages(_PAGES_DROPPED, claim.age, leaves=False)
        yield lambda: self.drop_tail(next(tails, None))

    def _copies_of_device(self) -> int:
        """Copies on the host of what is on the device too."""
        table = self._table
        both = np.count_nonzero(table.device.present & table.host.present)
        return int(both + np.count_nonzero(table.swa_device.present & table.swa_host.present))

    # ---- a memory that both components share ---------------------------------

    def _sharing(self, space: HostSpace) -> HostSpace | None:
        """The other component, if it shares its memory with this one."""
        if self._residency.tier is None or self._residency.tier.shared is None:
            return None
        return self._host_window if space is self._host else self._host

    def _for_an_extent(self, space: HostSpace) -> int:
        """Pages to drop so that an extent can be vacated."""
        assert self._residency.tier is not None
        assert self._residency.tier.shared is not None
        arena, component = self._residency.tier.shared.arena, self._component(space)
        return max(1, arena.pages_per_extent(component) - arena.holes(component))

    def _component(self, space: HostSpace) -> int:
        return 0 if space is self._host else 1

    def vacate(self, space: HostSpace) -> bool:
        """Set an extent of a component free by moving its pages into holes of others."""
        assert self._residency.tier is not None
        assert self._residency.tier.shared is not None
        shared, column = self._residency.tier.shared, space.column
        arena, component = shared.arena, self._component(space)
        if arena.holes(component) < arena.pages_per_extent(component):
            return False
        # what a transfer reads or writes stays where it is
        rows = np.flatnonzero(column.ready & (column.locks == 0))
        pages = arena.pages(column.slots[rows])
        chosen = arena.to_vacate(component, pages)
        if len(chosen) == 0:
            return False
        places = arena.slots(arena.move(component, chosen))
        shared.memory.move(component, arena.slots(chosen), places)
        column.slots[rows[np.isin(pages, chosen)]] = places
        self._counters.moved_host_pages += len(chosen)
        return True

    def _recycle(self, space: HostSpace, pages: int) -> None:
        """Free host pages for early copies, whose way to storage leads through the host: those
        of what is on the device and in storage too. They are made again when their eviction
        from the device is near."""
        table = self._table
        missing = pages + space.column.n_present // SPARE - space.free_pages
        if missing <= 0:
            return
        if space is self._host:
            both = table.host.ready & table.device.ready & (table.host.locks == 0)
            both &= table.stored == STORED
            if both.any():
                both &= ~self._above_host_only()
            rows = youngest_first(np.flatnonzero(both), table.age, missing)
            self._host.drop(rows)
            self._counters.reclaimed_duplicate_pages += len(rows)
            return
        kept = self._kept
        ends = np.flatnonzero(kept.ends & table.swa_device.ready)
        windows = kept.windows(ends)
        unsafe = ((windows >= 0) & (table.window_stored[windows] != STORED)).any(axis=1)
        ends = ends[self._on_device(windows) & ~self._in_use(windows) & ~unsafe]
        for end in youngest_first(ends, table.age, len(ends)).tolist():
            if missing <= 0:
                break
            freed = self._residency.forget_windows(np.array([end]))
            self._counters.reclaimed_duplicate_window_pages += freed
            missing -= freed

    # ---- what nobody has asked for -----------------------------------------------------

    def drop_spare(self) -> int:
        """Drop some windows that are kept because there was room: those first that were not
        used for longest. Looks at no others."""
        table, kept = self._table, self._kept
        ends = kept.spare()
        if len(ends) == 0:
            kept.beyond.clear()  # the rest is worth it by now
            return 0
        windows = kept.windows(ends)
        frees = ((windows >= 0) & (kept.uses[windows] == 1)).any(axis=1)
        ends = ends[frees & ~self._in_use(windows)]
        ends = ends[np.argsort(table.last_use(ends), kind="stable")]
        freed = self._residency.forget_windows(ends[: -(-len(ends) // _WINDOWS_DROPPED_SHARE)])
        self._counters.evicted_host_window_pages += freed
        return freed

    # ---- what no request can resume from -------------------------------------

    def _drop_useless(self, rows: Rows | None = None) -> int:
        """Drop copies of pages that lead to no window on the host and are on the device;
        ``rows`` or all."""
        if rows is None:
            rows = np.flatnonzero(self._table.host.ready)
        column, device = self._table.host, self._table.device
        useless = column.ready[rows] & device.ready[rows] & (column.locks[rows] == 0)
        rows = rows[useless & (self._kept.below[rows] == 0)]
        self._host.drop(rows)
        self._counters.reclaimed_duplicate_pages += len(rows)
        return len(rows)

    # ---- what is on the device too -------------------------------------------

    def _drop_duplicates(self, space: HostSpace, pages: int, younger_than: int) -> int:
        """Drop about ``pages`` copies of what is on the device too; returns how many.

        The most recently used go first: their device copies are the last to be evicted, so
        there is most time to copy them again. Those older than what needs the room stay, or
        the two would take each other's place forever.
        """
        if space is self._host:
            return self._drop_duplicate_pages(pages, younger_than, leaves=True)
        dropped = self._drop_duplicate_windows(pages, younger_than)
        self._counters.reclaimed_duplicate_window_pages += dropped
        return dropped

    def _drop_duplicate_pages(self, pages: int, younger_than: int, *, leaves: bool) -> int:
        """See ``_drop_duplicates``.

        Args:
            leaves: spare pages with descendants on the host alone: if the device evicts such
                a page before it is copied again, they are lost with it.
        """
        table, column = self._table, self._table.host
        both = column.ready & table.device.ready & (column.locks == 0)
        both &= table.age > younger_than
        if leaves and both.any():
            both &= ~self._above_host_only()
        rows = youngest_first(np.flatnonzero(both), table.age, pages)
        self._host.drop(rows)
        self._counters.reclaimed_duplicate_pages += len(rows)
        return len(rows)

    def _drop_duplicate_windows(self, pages: int, younger_than: int) -> int:
        table, kept = self._table, self._kept
        ends = np.flatnonzero(kept.ends & table.swa_device.ready & (table.age > younger_than))
        windows = kept.windows(ends)
        ends = ends[self._on_device(windows) & ~self._in_use(windows)]
        dropped = 0
        for end in youngest_first(ends, table.age, len(ends)).tolist():
            if dropped >= pages:
                break
            # counted as at least one: the caller goes on as long as something is dropped
            dropped += max(1, self._residency.forget_windows(np.array([end])))
        return dropped

    def _above_host_only(self) -> NDArray[np.bool_]:
        """Mask of pages with a descendant that is on the host alone."""
        table = self._table
        above = np.zeros(table.capacity, dtype=bool)
        level = np.flatnonzero(table.host.present & ~table.device.present)
        while len(level) > _FEW:
            parents = table.parent[level]
            level = np.unique(parents[parents >= 0]).astype(np.int64)
            level = level[~above[level]]
            above[level] = True
        for row in level.tolist():
            above[table.path(row)[:-1]] = True
        return above

    def _on_device(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which windows (n, window_pages) are whole on the device."""
        missing = (windows >= 0) & ~self._table.swa_device.ready[windows]
        incomplete: NDArray[np.bool_] = np.logical_or.reduce(missing, axis=1)
        return ~incomplete

    def _in_use(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which windows (n, window_pages) a transfer reads, writes or relies on."""
        held = (windows >= 0) & (self._table.swa_host.locks[windows] > 0)
        in_use: NDArray[np.bool_] = np.logical_or.reduce(held, axis=1)
        return in_use

    # ---- windows that others make up for -------------------------------------

    def _drop_superseded(self) -> int:
        """Drop some windows that are no longer worth keeping: those first whose recompute is
        the least for what they take and the longer they were not used."""
        table, kept = self._table, self._kept
        ends = np.flatnonzero(kept.ends & ~table.resume & (kept.below > 1))
        windows = kept.windows(ends)
        frees = ((windows >= 0) & (kept.uses[windows] == 1)).sum(axis=1)
        possible = (frees > 0) & ~self._in_use(windows)
        ends, frees = ends[possible], frees[possible]
        if len(ends) == 0:
            return 0
        above = [kept.above(end) for end in ends.tolist()]
        saved = [
            table.depth[end] - (-1 if row is None else table.depth[row])
            for end, row in zip(ends.tolist(), above, strict=True)
        ]
        order = cheapest_first(np.array(saved), frees, table.window_idle(ends))
        freed = self._residency.forget_windows(
            ends[order[: max(1, len(ends) // _WINDOWS_DROPPED_SHARE)]]
        )
        self._counters.evicted_host_window_pages += freed
        return freed

    # ---- what is worth least --------------------------------------------------

    def tails(self, limit: float) -> Iterator[int]:
        """Ends of kept windows with none below that are worth less than ``limit``, the least
        first; the one above follows when the last one below it is gone. Those that are on the
        device too are the matter of ``_drop_duplicates``."""
        table, kept = self._table, self._kept
        rows = np.flatnonzero(kept.ends & (kept.below == 1))
        heap = list(zip(table.worth(rows).tolist(), rows.tolist(), strict=True))
        heapq.heapify(heap)
        while heap and heap[0][0] < limit:
            _, end = heapq.heappop(heap)
            window = kept.windows(np.array([end]))
            if self._in_use(window)[0] or self._on_device(window)[0]:
                continue
            path = table.path(end)
            if table.host.locks[self._led_to(path, last=1)].any():
                continue  # somebody is about to go on from what would be lost
            above = kept.above(end)
            yield end
            if above is not None and kept.below[above] == 1:
                heapq.heappush(heap, (float(table.worth(np.array([above]))[0]), above))

    def drop_tail(self, end: int | None) -> bool:
        """Drop the last kept window of a prefix, and the pages on the host alone that led to
        nothing else."""
        if end is None:
            return False
        path = self._table.path(end)
        self._counters.evicted_host_window_pages += self._residency.forget_windows(path[-1:])
        self._drop_useless(path)
        lost = self._led_to(path, last=0)
        if len(lost):
            self._counters.evicted_host_pages += len(lost)
            self._sampling.note_lost(len(lost))
            self._residency.remove(lost)
        return True

    def _led_to(self, path: Rows, *, last: int) -> Rows:
        """Pages of a path on the host alone that lead to so many kept windows."""
        led: Rows = path[~self._table.device.present[path] & (self._kept.below[path] == last)]
        return led
