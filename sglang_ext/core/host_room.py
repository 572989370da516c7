"""Room on the host: what gives way to a backup, and to which one."""

import numpy as np

from sglang_ext.core.columns import Rows
from sglang_ext.core.host_space import HostSpace
from sglang_ext.core.plan import DeclineReason, Hold
from sglang_ext.core.state import IndexState
from sglang_ext.core.table import selector

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class HostRoom(IndexState):
    """The part of the index that frees host pages."""

    def _reserve_on_host(
        self, rows: Rows, full: Rows, windows: list[slice], make_room: bool
    ) -> tuple[Rows, Rows, bool]:
        """Reserve as much of a backup as there is host room for.

        Returns:
            (full rows, window rows, whether this rank's pools really gave slots). The
            copies are RESERVED and not held yet.
        """
        table = self.table
        # While room is made, what the backup needs must not be its victim; older windows
        # of the same path may be.
        needed = np.unique(np.concatenate([_NO_ROWS, *(rows[window] for window in windows)]))
        guard = Hold((table.host, selector(rows)), (table.swa_host, needed))
        if make_room and len(full):
            self._make_room(self.host, len(full), int(table.age[full].max()))
        if len(full) > self.host.free_pages:
            self.counters.declined[DeclineReason.HOST_FULL] += 1
            full, windows = full[: self.host.free_pages], []
        done = self._reserve(self.host, full)
        kept = _NO_ROWS
        for number, window in enumerate(windows):
            missing = rows[window][~table.swa_host.present[rows[window]]]
            pinned = self._pinned_window_pages + len(kept) + len(missing)
            if number > 0 and pinned > self.policy.pinned_window_pages:
                break
            age = int(table.swa_age[rows[window]].max())
            # a window that nobody has used yet takes nothing away
            if make_room and age >= 0:
                self._make_room(self.host_window, len(missing), age)
            if len(missing) > self.host_window.free_pages:
                self.counters.declined[DeclineReason.HOST_WINDOW_FULL] += 1
                break
            done &= self._reserve(self.host_window, missing)
            kept = np.concatenate((kept, missing))
        guard.release()
        return full, kept, done

    def _reserve(self, space: HostSpace, rows: Rows) -> bool:
        slots, done = space.reserve(rows)
        space.column.put(rows, slots, ready=False)
        return done

    # ---- who gives way -------------------------------------------------------

    def _make_room(self, space: HostSpace, pages: int, younger_than: int) -> None:
        """Free host pages of a component until there are ``pages``, as far as possible.

        First what costs least: copies of pages that are on the device too. Then what was
        used least recently, in the other component as well where both share a memory.

        Args:
            younger_than: age of the youngest page that needs the room.
        """
        if pages <= space.free_pages:
            return
        self._scan_is_due = True
        self._drop_duplicates(space, pages - space.free_pages, younger_than)
        other = self._sharing(space)
        if other is None:
            self._drop_oldest(space, pages - space.free_pages)
            return
        while pages > space.free_pages:
            if self._vacate(other):
                continue
            if self._drop_duplicates(other, self._for_an_extent(other), younger_than):
                continue
            victims = self._oldest_first(space, other)
            if not any(self._drop_oldest(v, self._batch(v, space, pages)) for v in victims):
                break

    def _sharing(self, space: HostSpace) -> HostSpace | None:
        """The other component, if it shares its memory with this one."""
        if self.host_tier is None or self.host_tier.shared is None:
            return None
        return self.host_window if space is self.host else self.host

    def _oldest_first(self, space: HostSpace, other: HostSpace) -> tuple[HostSpace, HostSpace]:
        own, others = space.oldest_age(), other.oldest_age()
        if own is None or (others is not None and others < own):
            return other, space
        return space, other

    def _batch(self, victim: HostSpace, wants: HostSpace, pages: int) -> int:
        """Pages to drop before looking again."""
        return pages - wants.free_pages if victim is wants else self._for_an_extent(victim)

    def _for_an_extent(self, space: HostSpace) -> int:
        """Pages to drop so that an extent can be vacated."""
        assert self.host_tier is not None
        assert self.host_tier.shared is not None
        arena, component = self.host_tier.shared.arena, self._component(space)
        return max(1, arena.pages_per_extent(component) - arena.holes(component))

    def _component(self, space: HostSpace) -> int:
        return 0 if space is self.host else 1

    def _vacate(self, space: HostSpace) -> bool:
        """Set an extent of a component free by moving its pages into holes of others."""
        assert self.host_tier is not None
        assert self.host_tier.shared is not None
        shared, column = self.host_tier.shared, space.column
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
        self.counters.moved_host_pages += len(chosen)
        return True

    def _drop_duplicates(self, space: HostSpace, pages: int, younger_than: int) -> int:
        dropped = len(space.pop_duplicates(pages, younger_than))
        if space is self.host:
            self.counters.reclaimed_duplicate_pages += dropped
        else:
            self.counters.reclaimed_duplicate_window_pages += dropped
        return dropped

    def _drop_oldest(self, space: HostSpace, pages: int) -> int:
        rows = space.pop_oldest(pages)
        if space is self.host_window:
            self.counters.evicted_host_window_pages += len(rows)
            return len(rows)
        self.counters.evicted_host_pages += len(rows)
        lost = rows[~self.table.device.present[rows]]
        if len(lost):
            self._remove(lost)
        return len(rows)
