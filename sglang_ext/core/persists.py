"""Persists, host to storage: a prefix in storage is always whole from its beginning."""

import numpy as np

from sglang_ext.core.columns import Rows, SlotColumn
from sglang_ext.core.demotion import worth_a_copy
from sglang_ext.core.host_room import NEEDED_NOW
from sglang_ext.core.loads import Loads
from sglang_ext.core.plan import Transfer
from sglang_ext.core.state import FIRST_PAUSE_MS
from sglang_ext.core.storage_plan import PERSISTS, Held, Objects, Persist, StorageLimits
from sglang_ext.core.table import STORED, STORING
from sglang_ext.core.window import dense_points

_BACKUPS_AT_ONCE = 4
_LOOKED_AT_A_STEP = 64
"""Paths; many of them have nothing new."""
_LONGEST_PAUSE_MS = 10_000


class Persists(Loads):
    """The part of the index that fills storage.

    The host pages that storage reads are pinned, not their rows: whatever the table does
    with a row meanwhile, nothing else is written into its slots.
    """

    def attach_storage(self, limits: StorageLimits) -> None:
        """There is storage from now on; what the host has is written there."""
        self.storage = limits
        self.storage_is_suspended = False
        self._storage_pause_ms, self._storage_paused_until = FIRST_PAUSE_MS, 0
        kept = self.checkpoints
        for end in np.flatnonzero(kept.ends & (kept.below == 1)).tolist():
            self.queue_persist(self.table.path(end))

    def detach_storage(self) -> None:
        """There is no storage any more; nothing may be in flight."""
        busy = len(self.persists) + len(self.lookups) + len(self.prefetches)
        assert busy == 0, f"{busy} storage operations are in flight"
        self.storage = None
        self.storage_is_suspended = False
        self._to_persist.clear()
        self.forget_stored()

    def forget_stored(self) -> None:
        """Storage was emptied: all that is on the host has to be written again."""
        for state in (self.table.stored, self.table.window_stored):
            state[state == STORED] = 0

    # ---- begin ---------------------------------------------------------------

    def begin_persists(self, now_ms: int) -> list[Persist]:
        """Start to write what waits, as far as the limits allow; once a step.

        Args:
            now_ms: a clock that shows the same on every rank.
        """
        begun: list[Persist] = []
        if self.storage is None or now_ms < self._storage_paused_until:
            return begun
        for _ in range(min(len(self._to_persist), _LOOKED_AT_A_STEP)):
            if len(self.persists) == PERSISTS or self._room_to_persist() == 0:
                break
            last, generation = self._to_persist.popleft()
            if self.table.is_current(last, generation):
                plan = self._begin_persist(self.table.path(last))
                if plan is not None:
                    begun.append(plan)
        return begun

    @property
    def has_to_persist(self) -> bool:
        """Whether paths wait for storage, and it was not just found broken."""
        return bool(self._to_persist) and self._storage_pause_ms == FIRST_PAUSE_MS

    def save_more(self, tried: set[int]) -> list[Transfer]:
        """Begin backups of what is on the device alone and worth keeping, the most recently
        used first: at shutdown, on the way to storage.

        Args:
            tried: ends of paths that were begun before; this adds to them.
        """
        table = self.table
        if self.storage_is_suspended:
            return []
        worth = table.resume & worth_a_copy(table, self.policy.write)
        ends = np.flatnonzero(worth & (table.window_stored != STORED))
        begun: list[Transfer] = []
        for end in ends[np.argsort(-table.age[ends])].tolist():
            if len(begun) == _BACKUPS_AT_ONCE:
                break
            if end not in tried:
                tried.add(end)
                path = table.path(end)
                plan = self._begin_backup(path, make_room=True, claim=NEEDED_NOW)
                if isinstance(plan, Transfer):
                    begun.append(plan)
                elif plan is None:
                    self.queue_persist(path)
        return begun

    def _room_to_persist(self) -> int:
        assert self.storage is not None
        return max(0, self.storage.persist_pages - self._persisted_pages)

    def _begin_persist(self, path: Rows) -> Persist | None:
        table = self.table
        if table.is_tail(int(path[-1])):
            path = path[:-1]  # storage has whole pages only
            if len(path) == 0:
                return None
        there = (table.stored[path] > 0) | table.host.ready[path]
        reach = len(path) if there.all() else int(there.argmin())
        full = path[:reach][table.stored[path[:reach]] == 0]
        if len(full) > (room := self._room_to_persist()):
            # the beginning now, the rest when that has been written
            reach, full = int(table.depth[full[room]]), full[:room]
            self.queue_persist(path)
        above = path[:reach]
        stops, inside = self._stops_to_store(above)
        window = self._in_windows(above, stops)
        window = window[table.window_stored[window] == 0]
        if len(full) == 0 and len(window) == 0:
            return None
        keys = table.storage_keys(above)
        first = int(table.depth[full[0]]) if len(full) else len(above)
        persist = Persist(
            op=self._next_persist,
            full=self._objects(table.host, full, keys),
            window=self._objects(table.swa_host, window, keys),
            keys=keys,
            first=first * self.geometry.slots_per_page,
            windows=frozenset(self._places(self._windows_in_use(above, stops, inside, window))),
            path=self._note(above),
            full_rows=self._note(full),
            window_rows=self._note(window),
        )
        self._next_persist += 1
        table.stored[full] = STORING
        table.window_stored[window] = STORING
        # eviction looks elsewhere; and if the rows go all the same, their slots stay
        table.host.lock(full)
        table.swa_host.lock(window)
        self.host.pin(persist.full.slots)
        self.host_window.pin(persist.window.slots)
        self._persisted_pages += len(full) + len(window)
        self.persists[persist.op] = persist
        return persist

    def _stops_to_store(self, path: Rows) -> tuple[tuple[int, ...], list[int]]:
        """Ends of the windows of a path that go to storage, and those of them that are there for
        a path that has lost its end. Files have room for more of these than the host, which has
        its own while nothing else needs the room, so they are written where it has them."""
        assert self.storage is not None
        kept = self.checkpoints
        there = kept.ends[path]
        needed = there & ~np.isin(path, kept.spare())
        inside: list[int] = []
        if self.storage.dense_pages:
            inside = dense_points(needed, there, self.storage.dense_pages)
        stops = np.union1d(np.flatnonzero(needed) + 1, inside).astype(np.int64)
        return tuple(stops.tolist()), inside

    def _windows_in_use(
        self, path: Rows, stops: tuple[int, ...], inside: list[int], window: Rows
    ) -> Rows:
        """Pages of windows that storage is to keep as long as their path: those that are worth
        keeping on the host, too, and the last one. Each is used as a whole, whoever wrote a
        part of it.

        Args:
            stops, inside: see ``_stops_to_store``.
            window: pages that are written now.
        """
        table = self.table
        worth = (*(np.flatnonzero(table.resume[path]) + 1).tolist(), *inside, *stops[-1:])
        pages = self._in_windows(path, worth)
        return np.union1d(pages[table.window_stored[pages] > 0], window)

    def _objects(self, column: SlotColumn, rows: Rows, keys: list[bytes]) -> Objects:
        return Objects([keys[place] for place in self._places(rows)], column.slots[rows])

    def _places(self, rows: Rows) -> list[int]:
        """Places of their keys among those of their path."""
        per_page = self.geometry.slots_per_page
        places: list[int] = (
            (self.table.depth[rows, None] * per_page + np.arange(per_page)).reshape(-1).tolist()
        )
        return places

    def _note(self, rows: Rows) -> Held:
        return Held(rows, self.table.generation[rows])

    def _still_there(self, held: Held) -> Rows:
        rows: Rows = held.rows[self.table.generation[held.rows] == held.generations]
        return rows

    # ---- end -----------------------------------------------------------------

    def commit_persist(self, op: int, pages: int, now_ms: int) -> None:
        """End a persist.

        Args:
            pages: so many of its pages, from the first one on, are in storage on every rank;
                full-attention pages come before windows.
            now_ms: see ``begin_persists``.
        """
        persist = self.persists.pop(op)
        table = self.table
        self.host.unpin(persist.full.slots)
        self.host_window.unpin(persist.window.slots)
        self._persisted_pages -= len(persist.full) + len(persist.window)
        full, window = self._still_there(persist.full_rows), self._still_there(persist.window_rows)
        table.host.unlock(full)
        table.swa_host.unlock(window)
        table.stored[full] = 0
        table.window_stored[window] = 0
        self._drop_unneeded(window)
        full_ok = min(pages, len(persist.full))
        window_ok = pages - full_ok
        path = self._still_there(persist.path)
        if len(path) == len(persist.path):
            self._note_stored(path, full[:full_ok], window[:window_ok])
        self.counters.persisted_pages += full_ok
        self.counters.persisted_window_pages += window_ok
        if pages == len(persist.full) + len(persist.window):
            self._storage_pause_ms = FIRST_PAUSE_MS
            return
        self.counters.unpersisted_pages += len(persist.full) + len(persist.window) - pages
        self._storage_paused_until = now_ms + self._storage_pause_ms
        self._storage_pause_ms = min(2 * self._storage_pause_ms, _LONGEST_PAUSE_MS)
        if pages == 0:
            # not even the first page: storage has lost what is in front of it, or all it had
            self.forget_stored()
        self.queue_persist(path)

    def _note_stored(self, path: Rows, full: Rows, window: Rows) -> None:
        """Pages of a path are in storage; they count up to the first one that is not."""
        table = self.table
        table.stored[full] = STORED
        whole = table.stored[path] == STORED
        reach = len(path) if whole.all() else int(whole.argmin())
        table.stored[full[table.depth[full] >= reach]] = 0
        table.window_stored[window[table.depth[window] < reach]] = STORED
