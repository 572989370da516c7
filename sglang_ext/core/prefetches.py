"""Prefetches, storage to host: a prompt's pages are brought while its request waits.

Nothing of a prefetch is in the table before it is whole up to a resume point, so it needs no
hold on the prefix that it continues: if that has gone meanwhile, so has the prefetch.
"""

from collections.abc import Hashable

import numpy as np

from sglang_ext.core.columns import Rows, Slots
from sglang_ext.core.counters import Unfulfilled
from sglang_ext.core.digest import Pages
from sglang_ext.core.host_room import NEEDED_NOW
from sglang_ext.core.host_space import HostSpace
from sglang_ext.core.persists import Persists
from sglang_ext.core.plan import Declined, DeclineReason, Hold
from sglang_ext.core.storage_keys import chain, namespace_seed
from sglang_ext.core.storage_plan import (
    LOOKUPS_A_STEP,
    PREFETCHES,
    Objects,
    Prefetch,
    Stage,
)
from sglang_ext.core.table import STORED
from sglang_ext.core.window import deepest_resume


class Prefetches(Persists):
    """The part of the index that brings pages from storage to the host."""

    def begin_lookup(self, pages: Pages, namespace: Hashable) -> Prefetch | Declined | None:
        """Look for a prompt in storage; None: there is too little to gain.

        Args:
            pages: (n, page_tokens) of the prompt.
        """
        limits = self.storage
        if limits is None:
            return None
        table, size = self.table, self.geometry.window_pages
        rows = table.lookup(pages, namespace)
        resume = self._resume_of(rows)
        if len(pages) - resume < limits.threshold_pages:
            return None
        room = limits.prefetch_pages - self._prefetched_pages
        if room <= 0 or len(self.lookups) >= 2 * LOOKUPS_A_STEP:
            return self._decline(DeclineReason.STORAGE_BACKLOG)
        limit = min(len(pages), len(rows) + room)
        first = max(0, resume + 1 - size)
        per_page = self.geometry.slots_per_page
        known = table.storage_keys(rows)
        before = known[-1] if known else namespace_seed(namespace)
        keys = known[first * per_page :] + chain(before, pages[len(rows) : limit], per_page)
        prefetch = Prefetch(
            op=self._next_prefetch,
            pages=pages[:limit].copy(),
            namespace=namespace,
            known=len(rows),
            resume=resume,
            first=first,
            keys=keys,
            limit=limit,
        )
        self._next_prefetch += 1
        self.lookups[prefetch.op] = prefetch
        return prefetch

    def _resume_of(self, rows: Rows) -> int:
        """Where a prompt can be resumed without storage."""
        table = self.table
        usable = table.swa_device.present[rows] | table.swa_host.ready[rows]
        return deepest_resume(usable, self.geometry.window_pages)

    def candidate(self, prefetch: Prefetch, found: list[int], bound: int) -> int:
        """The deepest resume point up to ``bound`` worth a prefetch, 0 if there is none.

        Args:
            found: resume points that this rank's storage has, in table pages, ascending.
        """
        assert self.storage is not None
        least = prefetch.resume + self.storage.threshold_pages
        possible = [stop for stop in found if least <= stop <= min(bound, prefetch.limit)]
        return possible[-1] if possible else 0

    def stops_up_to(self, prefetch: Prefetch, found: list[int], target: int) -> tuple[int, ...]:
        """Resume points to bring along, ascending; the last one is ``target``."""
        assert self.storage is not None
        stops = [target]
        for stop in reversed(found):
            if prefetch.resume < stop <= stops[-1] - self.storage.stop_pages:
                stops.append(stop)
        return tuple(reversed(stops))

    # ---- begin ---------------------------------------------------------------

    def begin_prefetch(self, op: int, stops: tuple[int, ...]) -> Prefetch | None:
        """Take a lookup's result: reserve host slots and start to read, or end it.

        Args:
            stops: resume points as every rank has them in storage, ascending; none: there is
                nothing.
        """
        prefetch = self.lookups.pop(op)
        if prefetch.cancelled:
            return None
        rows = self.table.lookup(prefetch.pages, prefetch.namespace)
        stops = tuple(stop for stop in stops if stop > self._resume_of(rows))
        found = stops[-1] - prefetch.resume if stops else 0
        self.counters.found_pages += found
        if len(rows) < prefetch.known:
            self._decline(DeclineReason.STALE)
            self.counters.unfulfilled[Unfulfilled.STALE] += found
            stops = ()
        elif len(self.prefetches) == PREFETCHES:
            self._decline(DeclineReason.STORAGE_BACKLOG)
            self.counters.unfulfilled[Unfulfilled.BACKLOG] += found
            stops = ()
        elif stops and not self._reserve_for(prefetch, rows, stops):
            self.counters.unfulfilled[Unfulfilled.HOST_FULL] += found
            stops = ()
        if not stops:
            prefetch.cancelled = True
            return None
        self.prefetches[op] = prefetch
        return prefetch

    def _reserve_for(self, prefetch: Prefetch, rows: Rows, stops: tuple[int, ...]) -> bool:
        size, known = self.geometry.window_pages, len(rows)
        spans = []  # of each stage: full pages [low, stop), window pages [begin, stop)
        low, window = known, 0
        for stop in stops:
            spans.append((min(low, stop), max(window, stop - size), stop))
            low, window = max(low, stop), stop
        pages = max(0, stops[-1] - known)
        window_pages = sum(stop - begin for _, begin, stop in spans)
        table = self.table
        # what the prefetch continues must not give way to it
        guard = Hold((table.host, rows), (table.swa_host, rows))
        self._make_room(self.host, pages, NEEDED_NOW)
        enough = pages <= self.host.free_pages
        full = self._take(self.host, pages) if enough else None
        if enough:
            self._make_room(self.host_window, window_pages, NEEDED_NOW)
            enough = window_pages <= self.host_window.free_pages
        guard.release()
        self._drop_unneeded(rows)
        if not enough:
            if full is not None:
                self._give_up(full[0], None)
            self._decline(DeclineReason.HOST_FULL)
            return False
        assert full is not None
        windows = self._take(self.host_window, window_pages)
        prefetch.stops, prefetch.known = stops, known
        prefetch.failed_here = not (full[1] and windows[1])
        prefetch.stages = self._stages(prefetch, spans, full[0], windows[0])
        self._prefetched_pages += pages + window_pages
        return True

    def _take(self, space: HostSpace, pages: int) -> tuple[Slots, bool]:
        """Host slots that are not in the table yet."""
        slots, done = space.reserve(np.arange(pages, dtype=np.int64))
        space.detached += pages
        return slots, done

    def _give_up(self, full: Slots, window: Slots | None) -> None:
        """Give back slots that ``_take`` gave."""
        self.host.detached -= len(full)
        self.host.release(full)
        if window is not None:
            self.host_window.detached -= len(window)
            self.host_window.release(window)

    def _stages(
        self,
        prefetch: Prefetch,
        spans: list[tuple[int, int, int]],
        full: Slots,
        windows: Slots,
    ) -> tuple[Stage, ...]:
        per_page = self.geometry.slots_per_page

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
        prefetch = self.prefetches[op]
        while prefetch.published < stages and not prefetch.cancelled:
            if not self._publish(prefetch):
                self._decline(DeclineReason.STALE)
                self.cancel_prefetch(op)
                return
            prefetch.published += 1

    def cancel_prefetch(self, op: int) -> None:
        """Nobody waits for it any more. What is read until then stays."""
        prefetch = self.lookups.get(op) or self.prefetches.get(op)
        if prefetch is not None and not prefetch.cancelled:
            prefetch.cancelled = True
            self.counters.cancelled_prefetches += 1

    def end_prefetch(self, op: int) -> None:
        """Nothing of it is read any more on any rank."""
        prefetch = self.prefetches.pop(op)
        if prefetch.published < len(prefetch.stages):
            why = Unfulfilled.LATE if prefetch.cancelled else Unfulfilled.UNREAD
            self.counters.unfulfilled[why] += prefetch.stops[-1] - prefetch.end
        for stage in prefetch.stages[prefetch.published :]:
            self._give_up(stage.full.slots, stage.window.slots)
            self.counters.lost_prefetched_pages += len(stage.full) + len(stage.window)
        self._prefetched_pages -= sum(len(s.full) + len(s.window) for s in prefetch.stages)

    def _publish(self, prefetch: Prefetch) -> bool:
        """Put the next stage in the table; False if it does not fit there any more."""
        table, number = self.table, prefetch.published
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
                self.counters.collisions += 1
                table.remove_rows(added)
                return False
        path = np.concatenate((rows, added)) if len(added) else rows
        table.advance()
        self.host.detached -= len(stage.full)
        if len(added):
            new = stage.full.slots[len(stage.full) - len(added) :]
            table.host.put(added, new, ready=True)
        self.host.release(stage.full.slots[: len(stage.full) - len(added)])
        self._note_found(path, prefetch.first)
        self._publish_window(path, stage)
        self._refresh(path)
        if not self.checkpoints.ends[path[-1]]:
            self.checkpoints.add(path)
        self.counters.prefetched_pages += len(added)
        return True

    def _note_found(self, path: Rows, first: int) -> None:
        """Pages of a path are in storage from ``first`` on, as has just been seen."""
        states = self.table.stored[path]
        there = states == STORED
        there[first:] |= states[first:] == 0
        reach = len(path) if there.all() else int(there.argmin())
        self.table.stored[path[:reach]] = STORED

    def _window_is_torn(self, rows: Rows, stop: int, brought: int) -> bool:
        """Whether the window before ``stop`` cannot be whole with what was brought."""
        size = self.geometry.window_pages
        column = self.table.swa_host
        before = rows[max(0, stop - size) : stop - brought]
        during = rows[stop - brought :]
        writing = column.present[during] & ~column.ready[during]
        return bool(writing.any()) or not column.ready[before].all()

    def _publish_window(self, path: Rows, stage: Stage) -> None:
        table, column = self.table, self.table.swa_host
        self.host_window.detached -= len(stage.window)
        window = path[len(path) - len(stage.window) :]
        there = column.present[window]
        if there.any():
            self.host_window.release(stage.window.slots[there])
        column.put(window[~there], stage.window.slots[~there], ready=True)
        table.window_stored[window[~there]] = STORED
        self.counters.prefetched_window_pages += len(stage.window)
