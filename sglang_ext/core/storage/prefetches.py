"""Prefetches, storage to host: a prompt's pages are brought while its request waits.

Nothing of a prefetch is in the table before it is whole up to a resume point, so it needs no
hold on the prefix that it continues: if that has gone meanwhile, so has the prefetch.
"""

import bisect
from collections.abc import Hashable

import numpy as np

from sglang_ext.core.counters import Unfulfilled
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.host.own_room import OwnRoom
from sglang_ext.core.host.room import NEEDED_NOW, HostRoom
from sglang_ext.core.plan import Declined, DeclineReason, Hold
from sglang_ext.core.residency import Residency
from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.storage.keys import chain
from sglang_ext.core.storage.plan import (
    LOOKUPS_A_STEP,
    PREFETCHES,
    Objects,
    Prefetch,
    Stage,
)
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.table import STORED
from sglang_ext.core.table.window import deepest_resume


class Prefetches:
    """Brings pages from storage to the host.

    Attributes:
        lookups: what is looked for, by number.
        reading: what is read, by number.
    """

    def __init__(
        self,
        residency: Residency,
        room: HostRoom,
        own_room: OwnRoom,
        ahead: LookAhead,
        attachment: Attachment,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._host, self._host_window = residency.host, residency.host_window
        self._kept = residency.kept
        self._counters = residency.counters
        self._geometry = residency.table.geometry
        self._room = room
        self._own_room = own_room
        self._ahead = ahead
        self._attachment = attachment
        self.lookups: dict[int, Prefetch] = {}
        self.reading: dict[int, Prefetch] = {}
        self._pages = 0

    def find(self, op: int) -> Prefetch | None:
        """A prefetch in flight."""
        return self.lookups.get(op) or self.reading.get(op)

    @property
    def pages(self) -> int:
        """Pages that are being read."""
        return self._pages

    def look_up(
        self, pages: Pages, namespace: Hashable, *, asks_only: bool = False
    ) -> Prefetch | Declined | None:
        """Look for a prompt in storage; None: there is too little to gain.

        Args:
            pages: (n, name_tokens) of the prompt.
            asks_only: read nothing of what is found.
        """
        limits = self._attachment.limits
        if limits is None or self._attachment.is_suspended:
            return None
        table, size = self._table, self._geometry.window_pages
        rows = table.lookup(pages, namespace)
        resume = self._resume_of(rows)
        if len(pages) - resume < limits.threshold_pages:
            return None
        room = limits.prefetch_pages - self._pages
        if room <= 0 or len(self.lookups) >= 2 * LOOKUPS_A_STEP:
            return self._counters.decline(DeclineReason.STORAGE_BACKLOG)
        limit = min(len(pages), len(rows) + room)
        first = max(0, resume + 1 - size)
        per_page = self._geometry.slots_per_page
        known = table.storage_keys(rows)
        before = known[-1] if known else table.seed(namespace)
        keys = known[first * per_page :] + chain(before, pages[len(rows) : limit], self._geometry)
        prefetch = Prefetch(
            op=self._attachment.number_prefetch(),
            pages=pages[:limit].copy(),
            namespace=namespace,
            known=len(rows),
            resume=resume,
            first=first,
            above=known[: first * per_page],
            keys=keys,
            limit=limit,
            asks_only=asks_only,
        )
        self.lookups[prefetch.op] = prefetch
        return prefetch

    def _resume_of(self, rows: Rows) -> int:
        """Where a prompt can be resumed without storage."""
        table = self._table
        usable = table.swa_device.present[rows] | table.swa_host.ready[rows]
        return deepest_resume(usable, self._geometry.window_pages)

    def candidate(self, prefetch: Prefetch, found: list[int], bound: int) -> int:
        """The deepest resume point up to ``bound`` worth a prefetch, 0 if there is none.

        Args:
            found: resume points that this rank's storage has, in table pages, ascending.
        """
        limits = self._attachment.limits
        assert limits is not None
        least = prefetch.resume + limits.threshold_pages
        number = bisect.bisect_right(found, min(bound, prefetch.limit))
        return found[number - 1] if number and found[number - 1] >= least else 0

    def stops_up_to(self, prefetch: Prefetch, found: list[int], target: int) -> tuple[int, ...]:
        """Resume points to bring along, ascending; the last one is ``target``."""
        limits = self._attachment.limits
        assert limits is not None
        stops = [target]
        for stop in reversed(found):
            if prefetch.resume < stop <= stops[-1] - limits.stop_pages:
                stops.append(stop)
        return tuple(reversed(stops))

    def cancel_all(self) -> None:
        """What is looked for and read is of no use any more."""
        for op in (*self.lookups, *self.reading):
            self.cancel(op)

    # ---- begin ---------------------------------------------------------------

    def begin(self, op: int, stops: tuple[int, ...]) -> Prefetch | None:
        """Take a lookup's result: reserve host slots and start to read, or end it.

        Args:
            stops: resume points as every rank has them in storage, ascending; none: there is
                nothing.
        """
        prefetch = self.lookups.pop(op)
        if prefetch.asks_only:
            prefetch.answer(stops)
        if prefetch.cancelled:
            return None
        rows = self._table.lookup(prefetch.pages, prefetch.namespace)
        stops = tuple(stop for stop in stops if stop > self._resume_of(rows))
        found = stops[-1] - prefetch.resume if stops else 0
        self._counters.found_pages += found
        if len(rows) < prefetch.known:
            self._counters.decline(DeclineReason.STALE)
            self._counters.unfulfilled[Unfulfilled.STALE] += found
            stops = ()
        elif len(self.reading) == PREFETCHES:
            self._counters.decline(DeclineReason.STORAGE_BACKLOG)
            self._counters.unfulfilled[Unfulfilled.BACKLOG] += found
            stops = ()
        elif stops and (why := self._reserve_for(prefetch, rows, stops)) is not None:
            self._counters.decline(why)
            quota = why is DeclineReason.QUOTA
            self._counters.unfulfilled[Unfulfilled.QUOTA if quota else Unfulfilled.HOST_FULL] += (
                found
            )
            stops = ()
        if not stops:
            prefetch.cancel()
            return None
        self.reading[op] = prefetch
        return prefetch

    def _reserve_for(
        self, prefetch: Prefetch, rows: Rows, stops: tuple[int, ...]
    ) -> DeclineReason | None:
        """Reserve host slots for what is read; why not, if that is not possible."""
        size, known = self._geometry.window_pages, len(rows)
        spans = []  # of each stage: full pages [low, stop), window pages [begin, stop)
        low, window = known, 0
        for stop in stops:
            spans.append((min(low, stop), max(window, stop - size), stop))
            low, window = max(low, stop), stop
        pages = max(0, stops[-1] - known)
        window_pages = sum(stop - begin for _, begin, stop in spans)
        table = self._table
        # what the prefetch continues must not give way to it
        guard = Hold((table.host, rows), (table.swa_host, rows))
        if not self._own_room.admits(prefetch.namespace, pages, window_pages):
            guard.release()
            self._residency.drop_unneeded(rows)
            return DeclineReason.QUOTA
        self._ahead.note_room(self._room.make(self._host, pages, NEEDED_NOW))
        enough = pages <= self._host.free_pages
        full = self._host.take(pages) if enough else None
        if enough:
            freed = self._room.make(self._host_window, window_pages, NEEDED_NOW)
            self._ahead.note_room(freed)
            enough = window_pages <= self._host_window.free_pages
        guard.release()
        self._residency.drop_unneeded(rows)
        if not enough:
            if full is not None:
                self._host.give_back(full[0])
            return DeclineReason.HOST_FULL
        assert full is not None
        windows = self._host_window.take(window_pages)
        stages = self._stages(prefetch, spans, full[0], windows[0])
        prefetch.reserve(stops, known, stages, done=full[1] and windows[1])
        self._own_room.expect(prefetch.namespace, pages, window_pages)
        self._pages += pages + window_pages
        return None

    def _stages(
        self,
        prefetch: Prefetch,
        spans: list[tuple[int, int, int]],
        full: Slots,
        windows: Slots,
    ) -> tuple[Stage, ...]:
        per_page = self._geometry.slots_per_page

        def keys(low: int, stop: int) -> list[bytes]:
            return prefetch.keys[
                (low - prefetch.first) * per_page : (stop - prefetch.first) * per_page
            ]

        stages, used, used_windows = [], 0, 0
        for low, begin, stop in spans:
            n, w = stop - low, stop - begin
            stages.append(
                Stage(
                    Objects(keys(low, stop), full[used : used + n]),
                    Objects(keys(begin, stop), windows[used_windows : used_windows + w]),
                )
            )
            used, used_windows = used + n, used_windows + w
        return tuple(stages)

    # ---- end -----------------------------------------------------------------

    def publish(self, op: int, stages: int) -> None:
        """So many stages of a prefetch have been read on every rank: put them in the table."""
        prefetch = self.reading[op]
        while prefetch.published < stages and not prefetch.cancelled:
            if not self._publish(prefetch):
                self._counters.decline(DeclineReason.STALE)
                self.cancel(op)
                return
            prefetch.note_published()

    def cancel(self, op: int) -> None:
        """Nobody waits for it any more. What is read until then stays."""
        prefetch = self.find(op)
        if prefetch is not None and not prefetch.cancelled:
            prefetch.cancel()
            self._counters.cancelled_prefetches += 1

    def end(self, op: int) -> None:
        """Nothing of it is read any more on any rank."""
        prefetch = self.reading.pop(op)
        if prefetch.published < len(prefetch.stages):
            why = Unfulfilled.LATE if prefetch.cancelled else Unfulfilled.UNREAD
            self._counters.unfulfilled[why] += prefetch.stops[-1] - prefetch.end
        for stage in prefetch.stages[prefetch.published :]:
            self._host.give_back(stage.full.slots)
            self._host_window.give_back(stage.window.slots)
            self._own_room.expect(prefetch.namespace, -len(stage.full), -len(stage.window))
            self._counters.lost_prefetched_pages += len(stage.full)
            self._counters.lost_prefetched_window_pages += len(stage.window)
        self._pages -= sum(len(s.full) + len(s.window) for s in prefetch.stages)

    def _publish(self, prefetch: Prefetch) -> bool:
        """Put the next stage in the table; False if it does not fit there any more."""
        table, number = self._table, prefetch.published
        stage, stop = prefetch.stages[number], prefetch.stops[number]
        pages = prefetch.pages[:stop]
        rows = table.lookup(pages, prefetch.namespace)
        first = stop - len(stage.full)  # pages [first, stop) are in the stage
        if len(rows) < first:
            return False
        if self._window_is_torn(rows, stop, len(stage.window)):
            return False
        added = rows[:0]
        if len(rows) < stop:
            added = table.add_rows(rows, pages[len(rows) :], prefetch.namespace)
            if len(rows) + len(added) < stop:
                self._counters.collisions += 1
                table.remove_rows(added)
                return False
        path = np.concatenate((rows, added)) if len(added) else rows
        table.advance()
        self._own_room.expect(prefetch.namespace, -len(stage.full), -len(stage.window))
        self._host.attach(len(stage.full))
        if len(added):
            new = stage.full.slots[len(stage.full) - len(added) :]
            self._host.put(added, new, ready=True)
        self._host.release(stage.full.slots[: len(stage.full) - len(added)])
        self._note_found(path, prefetch.first)
        self._publish_window(path, stage)
        self._residency.refresh(path)
        if not self._kept.ends[path[-1]]:
            self._kept.add(path)
        self._counters.prefetched_pages += len(added)
        return True

    def _note_found(self, path: Rows, first: int) -> None:
        """Pages of a path are in storage from ``first`` on, as has just been seen."""
        states = self._table.stored[path]
        there = states == STORED
        there[first:] |= states[first:] == 0
        reach = len(path) if there.all() else int(there.argmin())
        self._table.note_stored(path[:reach], STORED)
        self._residency.candidates.note(path)

    def _window_is_torn(self, rows: Rows, stop: int, brought: int) -> bool:
        """Whether the window before ``stop`` cannot be whole with what was brought."""
        size = self._geometry.window_pages
        column = self._table.swa_host
        before = rows[max(0, stop - size) : stop - brought]
        during = rows[stop - brought :]
        writing = column.present[during] & ~column.ready[during]
        return bool(writing.any()) or not column.ready[before].all()

    def _publish_window(self, path: Rows, stage: Stage) -> None:
        table, column = self._table, self._table.swa_host
        self._host_window.attach(len(stage.window))
        window = path[len(path) - len(stage.window) :]
        there = column.present[window]
        if there.any():
            self._host_window.release(stage.window.slots[there])
        self._host_window.put(window[~there], stage.window.slots[~there], ready=True)
        table.window_stored[window[~there]] = STORED
        self._counters.prefetched_window_pages += len(stage.window)
