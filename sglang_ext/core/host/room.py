"""Room on the host: what gives way to a backup, and to which one."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.candidates import YOUNGEST_FIRST, Kind
from sglang_ext.core.compiled import candidates as loops
from sglang_ext.core.compiled.candidates import ANY_AGE
from sglang_ext.core.device.victims import cheapest_first
from sglang_ext.core.host.kept import Forgotten
from sglang_ext.core.host.sampling import Sampling
from sglang_ext.core.host.space import SPARE, HostSpace
from sglang_ext.core.residency import Residency
from sglang_ext.core.retention.expiry import Expiry, NoExpiry
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.table import STORED, PageTable

_WINDOWS_DROPPED_SHARE = 16
"""Of windows that are worth little, one in this many goes at a time."""
_PAGES_DROPPED = 16
"""So many pages with descendants on the host alone go at a time."""
_SUPERSEDED_AT_ONCE = 512
"""Of windows that others make up for, so many of the least recently used are compared."""
_WINDOWS_AT_ONCE = 64
_NEVER = 1 << 62


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What needs room on the host.

    Attributes:
        age: of the youngest page.
        worth: of the prefixes that need it, the largest; see ``Prospects``.
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
            worth=float(table.prospects.worth(path[int(table.depth[pages[0]]) :]).max()),
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
    """Frees host pages: decides what gives way.

    Args:
        is_ample: see ``BackupPolicy.host_is_ample``.
    """

    def __init__(
        self,
        residency: Residency,
        sampling: Sampling,
        expiry: Expiry | NoExpiry,
        *,
        is_ample: bool = False,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._host, self._host_window = residency.host, residency.host_window
        self._kept = residency.kept
        self._candidates = residency.candidates
        self._counters = residency.counters
        self._sampling = sampling
        self._expiry = expiry
        self._is_ample = is_ample

    @property
    def copies_stay(self) -> bool:
        """Whether copies of what is on the device too go after the ends of prefixes that are worth
        less than what needs the room."""
        return self._is_ample or self._expiry.copies_stay

    def make(self, space: HostSpace, pages: int, claim: Claim) -> Freed:
        """Free host pages of a component until there are ``pages``, as far as possible.

        First goes what costs least: windows that are kept only because there was room; copies
        that lead to no window on the host; copies of what is on the device too; then windows
        inside conversations that others near them make up for; then copies of what is on the
        device and has descendants on the host alone; then the ends of those prefixes that are
        worth least. Where copies stay (see ``copies_stay``), windows that others make up for and
        such ends go before copies of what is on the device. Where both components share a memory,
        each gives way to the other.

        Args:
            claim: for what. Copies of what is on the device too give way only if they are
                younger, for they are needed later; what is on the host alone only if it is
                worth less.
        """
        if pages <= space.free_pages:
            return _ENOUGH
        copies, given = self._candidates.on_both_tiers(), 0
        other, spared = self._sharing(space), list[int]()
        is_enough = self._has_room(space, other, pages)
        for drop in self._stages(space, other, pages, claim, spared):
            while not is_enough and (dropped := drop()):
                given += dropped
                is_enough = self._has_room(space, other, pages)
            if is_enough:
                break
        if spared:
            self._candidates.look_at_tails().put_back(spared)
        fewer = self._candidates.on_both_tiers() < copies
        return Freed(is_enough, given, copies_of_device=fewer)

    def _has_room(self, space: HostSpace, other: HostSpace | None, pages: int) -> bool:
        """Whether there are so many free pages, if need be with extents of the other component
        that can be set free without a loss."""
        while pages > space.free_pages:
            if other is None or not self.vacate(other):
                return False
        return True

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
        self,
        space: HostSpace,
        other: HostSpace | None,
        pages: int,
        claim: Claim,
        spared: list[int],
    ) -> Iterator[Callable[[], int]]:
        """What gives way, one after the other; each returns what it has dropped. ``spared`` is
        for ``tails``."""
        yield self.drop_spare
        yield self._drop_useless
        if self.copies_stay:
            yield self._drop_superseded
            yield lambda: self._drop_tails(space, other, pages, claim.worth, spared)
        yield lambda: self._drop_duplicates(space, pages - space.free_pages, claim.age)
        if other is not None and (compaction := other.compaction) is not None:
            yield lambda: self._drop_duplicates(other, compaction.missing, claim.age)
        yield self._drop_superseded
        yield lambda: self._drop_duplicate_pages(_PAGES_DROPPED, claim.age, leaves=False)
        yield lambda: self._drop_tails(space, other, pages, claim.worth, spared)

    # ---- a memory that both components share ---------------------------------

    def _sharing(self, space: HostSpace) -> HostSpace | None:
        """The other component, if it shares its memory with this one."""
        if space.compaction is None:
            return None
        return self._host_window if space is self._host else self._host

    def vacate(self, space: HostSpace) -> bool:
        """Set an extent of a component free by moving its pages into holes of others."""
        moved = space.compaction.vacate() if space.compaction else 0
        if space is self._host:
            self._counters.moved_host_pages += moved
        else:
            self._counters.moved_host_window_pages += moved
        return moved > 0

    def _recycle(self, space: HostSpace, pages: int) -> None:
        """Free host pages for early copies, whose way to storage leads through the host: those
        of what is on the device and in storage too. They are made again when their eviction
        from the device is near."""
        missing = pages + space.column.n_present // SPARE - space.free_pages
        if missing <= 0:
            return
        if space is self._host:
            rows = self._candidates.first(Kind.STORED_DUPLICATES, missing)
            self._host.drop(rows)
            self._counters.reclaimed_duplicate_pages += len(rows)
            return
        for end in self._duplicate_windows(ANY_AGE, are_stored=True):
            if missing <= 0:
                break
            freed = self._residency.forget_window(end)
            self._counters.reclaimed_duplicate_window_pages += freed
            missing -= freed

    # ---- what nobody has asked for -----------------------------------------------------

    def drop_spare(self) -> int:
        """Drop some windows that are kept because there was room: those first that were not
        used for longest. Looks at no others."""
        table, kept = self._table, self._kept
        if not kept.beyond:
            return 0
        ends = kept.spare()
        if len(ends) == 0:
            kept.beyond.clear()  # the rest is worth it by now
            return 0
        windows = kept.windows(ends)
        frees = ((windows >= 0) & (kept.uses[windows] == 1)).any(axis=1)
        ends = ends[frees & ~self._residency.are_in_use(windows)]
        ends = ends[np.argsort(table.last_use(ends), kind="stable")]
        freed = self._residency.forget_windows(ends[: -(-len(ends) // _WINDOWS_DROPPED_SHARE)])
        self._counters.evicted_host_window_pages += freed
        return freed

    # ---- what no request can resume from -------------------------------------

    def _drop_useless(self) -> int:
        """Drop copies of pages that lead to no window on the host and are on the device."""
        if self._candidates.size(Kind.USELESS) == 0:
            return 0
        return self._drop_copies(self._candidates.all(Kind.USELESS))

    def _drop_copies(self, rows: Rows) -> int:
        """Drop copies of what is on the device too; returns how many."""
        if len(rows):
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
        kinds = YOUNGEST_FIRST[:-1] if leaves else YOUNGEST_FIRST
        return self._drop_copies(self._candidates.youngest(kinds, pages, younger_than))

    def _drop_duplicate_windows(self, pages: int, younger_than: int) -> int:
        dropped = 0
        for end in self._duplicate_windows(younger_than):
            if dropped >= pages:
                break
            # counted as at least one: the caller goes on as long as something is dropped
            dropped += max(1, self._residency.forget_window(end))
        return dropped

    def _duplicate_windows(self, younger_than: int, *, are_stored: bool = False) -> Iterator[int]:
        """Ends of kept windows that are whole on the device too and not in use, the most
        recently used first.

        Args:
            are_stored: only those that storage has, too.
        """
        kept, count, seen = self._kept, _WINDOWS_AT_ONCE, set[int]()
        while True:
            ends = self._candidates.youngest((Kind.WINDOW_DUPLICATES,), count, younger_than)
            is_all = len(ends) < count
            if len(ends) == 0:
                return
            ends = ends[[end not in seen for end in ends.tolist()]]
            seen.update(ends.tolist())
            windows = kept.windows(ends)
            possible = self._on_device(windows) & ~self._residency.are_in_use(windows)
            if are_stored:
                stored = self._table.window_stored[windows] == STORED
                possible &= (stored | (windows < 0)).all(axis=1)
            yield from ends[possible].tolist()
            if is_all:
                return
            count *= 2

    def _on_device(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which windows (n, window_pages) are whole on the device."""
        missing = (windows >= 0) & ~self._table.swa_device.ready[windows]
        incomplete: NDArray[np.bool_] = np.logical_or.reduce(missing, axis=1)
        return ~incomplete

    # ---- windows that others make up for -------------------------------------

    def _drop_superseded(self) -> int:
        """Drop some windows that are no longer worth keeping: of those that were not used for
        longest those first whose recompute is the least for what they take and the longer they
        were not used."""
        table, kept = self._table, self._kept
        ends, frees = self._superseded()
        if len(ends) == 0:
            return 0
        saved = np.empty(len(ends), dtype=np.int64)
        loops.pages_since_end(table.parent, kept.ends, ends, saved)
        order = cheapest_first(saved, frees, table.window_idle(ends))
        freed = self._residency.forget_windows(
            ends[order[: max(1, len(ends) // _WINDOWS_DROPPED_SHARE)]]
        )
        self._counters.evicted_host_window_pages += freed
        return freed

    def _superseded(self) -> tuple[Rows, NDArray[np.int64]]:
        """(ends, rising; pages that are free without each window) of windows that may go: of the
        least recently used ones, or where these may not, of more of them."""
        kept, looked_at = self._kept, _SUPERSEDED_AT_ONCE
        while True:
            ends = self._candidates.first(Kind.SUPERSEDED, looked_at)
            if len(ends) == 0:
                return ends, ends
            is_all = len(ends) < looked_at
            ends.sort()
            windows = kept.windows(ends)
            frees = ((windows >= 0) & (kept.uses[windows] == 1)).sum(axis=1)
            possible = (frees > 0) & ~self._residency.are_in_use(windows)
            if is_all or possible.any():
                return ends[possible], frees[possible]
            looked_at *= 2

    # ---- what is worth least --------------------------------------------------

    def tails(self, limit: float, spared: list[int], come: list[int]) -> Iterator[int]:
        """Ends of kept windows with none below that are worth less than ``limit``, those first that
        are worth least; each is gone before the next one is asked for. Those that are on the device
        too are the matter of ``_drop_duplicates``.

        Args:
            spared: this adds those that cannot go now; to be put back.
            come: the one above is such a window when the last one below it is gone; see ``Tails``.
        """
        for end in self._candidates.look_at_tails().rising(limit, come):
            if self._candidates.tail_stays(end):
                spared.append(end)
            else:
                yield end

    def _drop_tails(
        self, space: HostSpace, other: HostSpace | None, pages: int, limit: float, spared: list[int]
    ) -> int:
        """Drop the last kept windows of those prefixes that are worth least, and what led to
        nothing else, until there is room for ``pages`` or an extent of the other component can be
        vacated; how many. What they free is known before it is free, so they go together."""
        missing, gone, come = pages - space.free_pages, list[Forgotten](), list[int]()
        beside = other.compaction.missing if other and other.compaction else _NEVER
        full = windows = 0
        for end in self.tails(limit, spared, come):
            gone.append(tail := self._residency.forget_tail(end))
            if tail.above >= 0:
                come.append(tail.above)
            full += len(tail.copies) + len(tail.lost)
            windows += len(tail.windows)
            own, others = (full, windows) if space is self._host else (windows, full)
            if own >= missing or others >= beside:
                break
        if gone:
            self._drop(gone)
        return len(gone)

    def drop_tail(self, end: int) -> None:
        """Drop the last kept window of a prefix, and the pages on the host alone that led to
        nothing else."""
        self._drop([self._residency.forget_tail(end)])

    def _drop(self, gone: list[Forgotten]) -> None:
        """Drop what nothing leads to any more."""
        windows, copies, lost, _ = gone[0]
        if len(gone) > 1:
            windows = np.concatenate([tail.windows for tail in gone])
            copies = np.concatenate([tail.copies for tail in gone])
            lost = np.concatenate([tail.lost for tail in gone])
        self._host_window.drop(windows)
        self._counters.evicted_host_window_pages += len(windows)
        self._drop_copies(copies)
        if len(lost):
            self._counters.evicted_host_pages += len(lost)
            self._sampling.note_lost(len(lost))
            self._expiry.note_lost(lost)
            self._residency.remove(lost)
