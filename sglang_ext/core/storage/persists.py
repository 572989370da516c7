"""Persists, host to storage: a prefix in storage is always whole from its beginning."""

from collections import deque

import numpy as np

from sglang_ext.core.candidates import Kind
from sglang_ext.core.plan import DeclineReason
from sglang_ext.core.residency import Residency
from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.storage.plan import PERSISTS, Held, Objects, Persist
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.table import STORED, STORING
from sglang_ext.core.table.window import dense_points

_LOOKED_AT_A_STEP = 64
"""Paths; many of them have nothing new."""
_MOST_WAITING = 4096
"""Paths that wait for storage; beyond, the oldest one is forgotten until it grows."""


class Persists:
    """Fills storage.

    The host pages that storage reads are pinned, not their rows: whatever the table does
    with a row meanwhile, nothing else is written into its slots.

    Attributes:
        writing: what storage writes, by number.
    """

    def __init__(self, residency: Residency, attachment: Attachment) -> None:
        self._residency = residency
        self._table = residency.table
        self._kept = residency.kept
        self._candidates = residency.candidates
        self._counters = residency.counters
        self._attachment = attachment
        self.writing: dict[int, Persist] = {}
        self._pages = 0
        # (last row, its generation) of paths that wait until storage takes them
        self._waiting: deque[tuple[int, int]] = deque()

    @property
    def pages(self) -> int:
        """Pages that are being written."""
        return self._pages

    @property
    def n_waiting(self) -> int:
        """Paths that wait."""
        return len(self._waiting)

    @property
    def has_more(self) -> bool:
        """Whether paths wait for storage, and it was not just found broken."""
        return bool(self._waiting) and not self._attachment.is_broken

    def queue(self, path: Rows) -> None:
        """Note a path that has new pages on the host."""
        attachment = self._attachment
        if not attachment.is_there or attachment.is_suspended or len(path) == 0:
            return
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self._counters.decline(DeclineReason.STORAGE_BACKLOG)
        last = int(path[-1])
        self._waiting.append((last, int(self._table.generation[last])))

    def queue_all(self) -> None:
        """All that the host has is to be written."""
        ends = np.sort(np.array(list(self._candidates.look_at_tails().places), dtype=np.int64))
        forgotten = max(0, len(self._waiting) + len(ends) - _MOST_WAITING)
        self._counters.declined[DeclineReason.STORAGE_BACKLOG] += forgotten
        generations = self._table.generation[ends].tolist()
        waiting = [*self._waiting, *zip(ends.tolist(), generations, strict=True)]
        self._waiting = deque(waiting[forgotten:])

    def forget_waiting(self) -> None:
        """Write nothing of what waits."""
        self._waiting.clear()

    def forget_stored(self) -> None:
        """Storage was emptied: all that is on the host has to be written again."""
        self._table.forget_stored()
        self._candidates.note(self._candidates.all(Kind.STORED_DUPLICATES))

    # ---- begin ---------------------------------------------------------------

    def begin(self, now_ms: int) -> list[Persist]:
        """Start to write what waits, as far as the limits allow; once a step.

        Args:
            now_ms: a clock that shows the same on every rank.
        """
        begun: list[Persist] = []
        if not self._attachment.is_there or now_ms < self._attachment.paused_until:
            return begun
        for _ in range(min(len(self._waiting), _LOOKED_AT_A_STEP)):
            if len(self.writing) == PERSISTS or self._room_to_persist() == 0:
                break
            last, generation = self._waiting.popleft()
            if self._table.is_current(last, generation):
                plan = self._begin(self._table.path(last))
                if plan is not None:
                    begun.append(plan)
        return begun

    def _room_to_persist(self) -> int:
        limits = self._attachment.limits
        assert limits is not None
        return max(0, limits.persist_pages - self._pages)

    def _begin(self, path: Rows) -> Persist | None:
        table = self._table
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
            self.queue(path)
        above = path[:reach]
        stops, inside = self._stops_to_store(above)
        window = self._residency.in_windows(above, stops)
        window = window[table.window_stored[window] == 0]
        if len(full) == 0 and len(window) == 0:
            return None
        keys = table.storage_keys(above)
        first = int(table.depth[full[0]]) if len(full) else len(above)
        persist = Persist(
            op=self._attachment.number_persist(),
            full=self._objects(table.host, full, keys),
            window=self._objects(table.swa_host, window, keys),
            keys=keys,
            first=first * table.geometry.slots_per_page,
            windows=frozenset(self._places(self._windows_in_use(above, stops, inside, window))),
            path=self._note(above),
            full_rows=self._note(full),
            window_rows=self._note(window),
        )
        table.note_stored(full, STORING)
        self._candidates.note(full)
        table.window_stored[window] = STORING
        # eviction looks elsewhere; and if the rows go all the same, their slots stay
        table.host.lock(full)
        table.swa_host.lock(window)
        self._residency.host.pin(persist.full.slots)
        self._residency.host_window.pin(persist.window.slots)
        self._pages += len(full) + len(window)
        self.writing[persist.op] = persist
        return persist

    def _stops_to_store(self, path: Rows) -> tuple[tuple[int, ...], list[int]]:
        """Ends of the windows of a path that go to storage, and those of them that are there for
        a path that has lost its end. Files have room for more of these than the host, which has
        its own while nothing else needs the room, so they are written where it has them."""
        limits, kept = self._attachment.limits, self._kept
        assert limits is not None
        there = kept.ends[path]
        needed = there & ~np.isin(path, kept.spare())
        inside: list[int] = []
        if limits.dense_pages:
            inside = dense_points(needed, there, limits.dense_pages)
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
        table = self._table
        worth = (*(np.flatnonzero(table.resume[path]) + 1).tolist(), *inside, *stops[-1:])
        pages = self._residency.in_windows(path, worth)
        return np.union1d(pages[table.window_stored[pages] > 0], window)

    def _objects(self, column: SlotColumn, rows: Rows, keys: list[bytes]) -> Objects:
        return Objects([keys[place] for place in self._places(rows)], column.slots[rows])

    def _places(self, rows: Rows) -> list[int]:
        """Places of their keys among those of their path."""
        per_page = self._table.geometry.slots_per_page
        places: list[int] = (
            (self._table.depth[rows, None] * per_page + np.arange(per_page)).reshape(-1).tolist()
        )
        return places

    def _note(self, rows: Rows) -> Held:
        return Held(rows, self._table.generation[rows])

    def _still_there(self, held: Held) -> Rows:
        rows: Rows = held.rows[self._table.generation[held.rows] == held.generations]
        return rows

    # ---- end -----------------------------------------------------------------

    def commit(self, op: int, pages: int, now_ms: int) -> None:
        """End a persist.

        Args:
            pages: so many of its pages, from the first one on, are in storage on every rank;
                full-attention pages come before windows.
            now_ms: see ``begin``.
        """
        persist = self.writing.pop(op)
        table = self._table
        self._residency.host.unpin(persist.full.slots)
        self._residency.host_window.unpin(persist.window.slots)
        self._pages -= len(persist.full) + len(persist.window)
        full, window = self._still_there(persist.full_rows), self._still_there(persist.window_rows)
        table.host.unlock(full)
        table.swa_host.unlock(window)
        table.note_stored(full, 0)
        table.window_stored[window] = 0
        self._candidates.note(full)
        self._residency.drop_unneeded(window)
        full_ok = min(pages, len(persist.full))
        window_ok = pages - full_ok
        path = self._still_there(persist.path)
        if len(path) == len(persist.path):
            self._note_stored(path, full[:full_ok], window[:window_ok])
        self._counters.persisted_pages += full_ok
        self._counters.persisted_window_pages += window_ok
        ok = pages == len(persist.full) + len(persist.window)
        self._attachment.note_write(now_ms, ok=ok)
        if ok:
            return
        self._counters.unpersisted_pages += len(persist.full) - full_ok
        self._counters.unpersisted_window_pages += len(persist.window) - window_ok
        if pages == 0:
            # not even the first page: storage has lost what is in front of it, or all it had
            self.forget_stored()
        self.queue(path)

    def _note_stored(self, path: Rows, full: Rows, window: Rows) -> None:
        """Pages of a path are in storage; they count up to the first one that is not."""
        table = self._table
        table.note_stored(full, STORED)
        self._candidates.note(full)
        whole = table.stored[path] == STORED
        reach = len(path) if whole.all() else int(whole.argmin())
        table.note_stored(full[table.depth[full] >= reach], 0)
        table.window_stored[window[table.depth[window] < reach]] = STORED
