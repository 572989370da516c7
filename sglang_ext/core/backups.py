"""Backups, device to host: what is copied, room on the host, begin, abandon, commit."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows
from sglang_ext.core.demotion import Ahead, paths_of_pages, worth_a_copy
from sglang_ext.core.host_room import SPARE, STEPS_AFTER_A_FAILURE, Claim, HostRoom
from sglang_ext.core.host_space import HostSpace
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind
from sglang_ext.core.sampling import passed_over
from sglang_ext.core.state import STEPS_KEPT
from sglang_ext.core.window import complete_windows, deepest_resume, dense_points
from sglang_ext.core.write_policy import WritePolicy, pages_to_copy_now

_MOST_PATHS_A_STEP = 8
"""A step starts as many copies of each kind at most; the next one goes on."""
_MOST_LOOKED_AT = 64
"""Paths that may be looked at for that, as some have nothing that can be copied."""
_MOST_SPARE = 1024
"""Windows that are kept because there is room: all of them are looked at when it is needed."""
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_STEPS_AHEAD = 3
"""Copies are ahead of eviction by what so many steps take."""
_NEVER = 1 << 62
_BACKLOG = Declined(DeclineReason.BACKLOG)


class Backups(HostRoom):
    """The part of the index that fills the host tier."""

    def begin_backup(self, rows: Rows) -> Transfer | Declined | None:
        """What the write policy copies to the host when a request has extended ``rows``.

        None: there is nothing to copy.
        """
        rows = rows[: pages_to_copy_now(self._write_policy(), self.table.hits[rows])]
        if len(rows) == 0:
            return None
        # a copy that is not needed yet takes nothing away from those that are
        no_room = self.storage is None and self._free(self.host, needed_now=False) == 0
        no_room &= len(self.checkpoints.beyond) == 0
        if no_room and not self.table.host.present[rows].all():
            # the usual answer where nothing comes twice, so it is given before anything is planned
            return self._decline(DeclineReason.HOST_FULL)
        plan = self._begin_backup(rows, make_room=False)
        if plan == _BACKLOG:
            self._late.append((int(rows[-1]), int(self.table.generation[rows[-1]])))
        return plan

    def _write_policy(self) -> WritePolicy:
        """Where running requests hold nearly all of the device, what they leave is needed at
        once when they end: it is too late then to copy it ahead of its eviction."""
        write = self.policy.write
        free = self.device_pool.free_pages() + self.table.device.n_evictable
        if write is WritePolicy.WRITE_BACK and free < self._low_pages():
            return WritePolicy.WRITE_THROUGH
        return write

    def demote_ahead(self) -> list[Transfer]:
        """Start copies of what eviction takes next, if room gets low; once a step."""
        if self.host_tier is None:
            return []
        free = self.device_pool.free_pages(), self.device_pool.free_window_pages()
        self._note_step(free[0])
        if self._late:
            return self._catch_up()
        if not self._room_may_be_low(*free):
            return []
        if self._pause > 0:
            self._pause -= 1
            return []
        state = (*free, *self._scan_state())
        if state == self._scanned and not self._scan_is_due:
            return []
        self._scanned = state
        full, window, window_end, with_window = self._look_ahead(*free)
        begun = self._begin_some(paths_of_pages(self.table, full.dirty, full.soon, window_end))
        ends = dict.fromkeys(window_end[window.dirty].tolist())
        begun += self._begin_some((self.table.path(end), _NO_ROWS) for end in ends)
        if self._are_on_host(full.dirty, window.dirty, with_window):
            self._room_left, self._window_room_left = full.room_then, window.room_then
        return begun

    def _note_step(self, free: int) -> None:
        """Remember the most that a step takes: copies that are begun now have ended a step or
        two later, so what those take must have its copies before."""
        taken = self._free_at_step + self._evicted_in_step - free
        self._free_at_step, self._evicted_in_step = free, 0
        if taken > 0:
            faded = self._step_share - self._step_share // STEPS_KEPT
            self._step_share = max(taken * STEPS_KEPT, faded)
            self._steps_of_care = max(0, self._steps_of_care - 1)

    def _low_pages(self) -> int:
        """Pages, free ones included, that eviction shall be able to free without a loss: what is
        copied ahead is in both tiers at once, so they are no more than was seen to be needed."""
        policy, ahead = self.policy, _STEPS_AHEAD * self._step_share // STEPS_KEPT
        if not self._steps_of_care:
            return policy.low_pages
        return max(policy.low_pages, min(ahead, policy.most_low_pages))

    def _catch_up(self) -> list[Transfer]:
        """Start copies that were due while too many others were being made: what is in a hurry
        must not be lost for having come at a bad time."""
        begun: list[Transfer] = []
        if self._copied_pages >= self._refused_at:
            return begun
        self._refused_at = _NEVER
        for _ in range(min(len(self._late), _MOST_PATHS_A_STEP)):
            last, generation = self._late[0]
            if self.table.is_current(last, generation) and self.table.device.ready[last]:
                plan = self._begin_backup(self.table.path(last), make_room=False)
                if plan == _BACKLOG:
                    self._refused_at = self._copied_pages
                    break
                if isinstance(plan, Transfer):
                    begun.append(plan)
            self._late.popleft()
        return begun

    def _are_on_host(self, full: Rows, window: Rows, with_window: NDArray[np.bool_]) -> bool:
        """Whether pages are on the host or on their way, and windows that would be lost."""
        both = np.concatenate((full[with_window[full]], window))
        table = self.table
        return bool(table.host.present[full].all() and table.swa_host.present[both].all())

    def _scan_state(self) -> tuple[int, ...]:
        """Changes with whatever may let a scan find something else: where requests hold all of
        the device, room is low for long, and most steps of a decode change nothing."""
        table, backups = self.table, TransferKind.BACKUP
        locked = table.device.n_locked, table.swa_device.n_locked
        return (table.tick, *locked, self.last_op(backups), len(self.pending[backups]))

    def _begin_some(self, paths: Iterator[tuple[Rows, Rows]]) -> list[Transfer]:
        """Backups of (path, pages) until there are enough for one step."""
        begun: list[Transfer] = []
        for path, pages in itertools.islice(paths, _MOST_LOOKED_AT):
            plan = self._begin_backup(path, make_room=True, pages=pages)
            if isinstance(plan, Transfer):
                begun.append(plan)
            if len(begun) == _MOST_PATHS_A_STEP:
                break
        return begun

    def _look_ahead(
        self, free: int, free_windows: int
    ) -> tuple[Ahead, Ahead, NDArray[np.int64], NDArray[np.bool_]]:
        """What to copy of each component, and what ``windows_to_save`` gives. O(rows)."""
        table, policy = self.table, self.policy
        self._free_at_scan, self._free_windows_at_scan = free, free_windows
        self._evicted = self._evicted_windows = self._held = 0
        self._scan_is_due = False
        worth = worth_a_copy(table, policy.write)
        if self.is_sampling:
            worth &= ~passed_over(table)
        window_end, with_window = self._demotion.windows_to_save(worth & self._marked())
        full = self._demotion.look_ahead(
            table.device,
            table.host,
            table.age,
            # a page takes its window along
            (worth & ~table.host.present) | with_window,
            self._pins,
            self._free_at_scan,
            self._low_pages(),
        )
        window = self._demotion.look_ahead(
            table.swa_device,
            table.swa_host,
            table.swa_age,
            with_window,
            1,
            self._free_windows_at_scan,
            policy.low_window_pages,
        )
        self._room_left, self._window_room_left = full.room, window.room
        return full, window, window_end, with_window

    def _room_may_be_low(self, free: int, free_windows: int) -> bool:
        """Whether a scan could find too little room: what was allocated and locked since
        the last one is as much as that one allowed for."""
        if self._scan_is_due:
            return True
        used = self._free_at_scan + self._evicted - free
        windows = self._free_windows_at_scan + self._evicted_windows - free_windows
        left = min(self._room_left - used, self._window_room_left - windows)
        return left <= self._held

    def _begin_backup(
        self,
        rows: Rows,
        *,
        make_room: bool,
        pages: Rows | None = None,
        claim: Claim | None = None,
    ) -> Transfer | Declined | None:
        """Start to copy pages of a path to the host, and the windows worth keeping.

        A window is copied whole or not at all. Pages from which no request could resume on
        the host are not copied.

        Args:
            rows: the path.
            make_room: whether other host copies may give way.
            pages: those of ``rows`` to copy; None for all without a host copy.
            claim: on what others have; None for what the pages are worth.
        """
        table = self.table
        if pages is None:
            pages = rows[table.device.ready[rows]]
        elif self.storage is not None and len(pages):
            # storage has a page only behind all those in front of it
            above = rows[: int(table.depth[pages].max())]
            above = above[table.device.ready[above] & (table.stored[above] == 0)]
            pages = np.union1d(pages, above)
            pages = pages[np.argsort(table.depth[pages])]
        pages = pages[~table.host.present[pages]]
        stops = self._stops(rows)
        pages = self._leading_somewhere(rows, pages, stops)
        missing = self._missing_windows(rows, stops)
        if len(pages) == 0 and not any(len(window) for window in missing):
            if stops:
                self._keep_windows(rows, stops)
                self.queue_persist(rows)
            return None
        if not self._backlog_allows(len(pages), len(missing[0]) if missing else 0):
            return self._decline(DeclineReason.BACKLOG)
        if make_room and claim is None:
            claim = Claim.of(table, rows, pages)
        reserved = self._reserve_on_host(rows, pages, stops, claim if make_room else None)
        if isinstance(reserved, DeclineReason):
            return Declined(reserved)
        full, window = reserved.full, reserved.window
        hold = Hold(
            (table.device, rows),
            (table.swa_device, window),
            (table.host, full),
            # also what the windows share with others that are on the host, or will be
            (table.swa_host, self._in_windows(rows, reserved.stops)),
        )
        self._copied_pages += len(full)
        self._pins[rows] += 1
        self._pinned_window_pages += len(window)
        transfer = self._begin(
            TransferKind.BACKUP,
            Copies(full, table.device.slots[full], table.host.slots[full]),
            Copies(window, table.swa_device.slots[window], table.swa_host.slots[window]),
            hold,
            rows,
        )
        transfer.stops, transfer.spare = reserved.stops, reserved.spare
        transfer.failed_here = not reserved.done
        return transfer

    def _in_windows(self, rows: Rows, stops: tuple[int, ...]) -> Rows:
        """Pages of the windows before resume points of a path, each once."""
        inside = np.zeros(len(rows), dtype=bool)
        for stop in stops:
            inside[max(0, stop - self.geometry.window_pages) : stop] = True
        return rows[inside]

    def _leading_somewhere(self, rows: Rows, pages: Rows, stops: tuple[int, ...]) -> Rows:
        """Those of ``pages`` on a path that lead to a resume point on the host, if ``stops``
        are among them."""
        reach = max(*stops, self._reach(rows)) if stops else self._reach(rows)
        return pages[self.table.depth[pages] < reach]

    def _keep_windows(
        self, path: Rows, stops: tuple[int, ...], spare: tuple[int, ...] = ()
    ) -> None:
        """Keep those windows whose pages are all on the host.

        Args:
            spare: those of ``stops`` for which there just was room.
        """
        kept, size = self.checkpoints, self.geometry.window_pages
        for stop in stops:
            ready = self.table.swa_host.ready[path[max(0, stop - size) : stop]].all()
            if ready and not kept.ends[path[stop - 1]]:
                kept.add(path[:stop])
                if stop in spare:
                    kept.beyond.add(int(path[stop - 1]))

    def _reach(self, rows: Rows) -> int:
        """Pages of a path that lead to a window on the host."""
        return int(np.count_nonzero(self.checkpoints.below[rows]))

    def _stops(self, rows: Rows) -> tuple[int, ...]:
        """Resume points of a path whose windows are to be kept on the host and are not yet,
        the deepest first: those that are worth it, and one without which the path could not
        be resumed at its end."""
        table, size = self.table, self.geometry.window_pages
        usable = table.swa_host.present[rows] | table.swa_device.ready[rows]
        complete = complete_windows(usable, size)
        worth = table.resume[rows] & complete
        if len(extra := self._ends_with_room(rows[complete])):
            worth |= np.isin(rows, extra)
        if (best := deepest_resume(usable, size)) > self._reach(rows):
            worth[best - 1] = True
        if self.storage is not None and len(rows) > 1 and table.is_tail(int(rows[-1])):
            # from there the conversation goes on in storage, which takes no tails
            worth[-2] = complete_windows(usable, size)[-2]
        worth &= ~self.checkpoints.ends[rows]
        return tuple((np.flatnonzero(worth)[::-1] + 1).tolist())

    def _marked(self) -> NDArray[np.bool_]:
        """Mask of pages whose windows are worth a copy now."""
        table = self.table
        if self._free(self.host_window, needed_now=False) < self.geometry.window_pages:
            return table.resume
        return table.resume | table.resume_if_room

    def _ends_with_room(self, ends: Rows) -> Rows:
        """Those of ``ends`` whose windows are worth a copy where there is room for them, as many
        as there is room for; the last ones of a path, if ``ends`` are in its order."""
        table = self.table
        ends = ends[table.resume_if_room[ends] & ~self.checkpoints.ends[ends]]
        most = self._free(self.host_window, needed_now=False) // self.geometry.window_pages
        return ends[max(0, len(ends) - most) :]

    def _missing_windows(self, rows: Rows, stops: tuple[int, ...]) -> list[Rows]:
        """For each resume point the pages of its window to copy that no deeper one copies."""
        present = self.table.swa_host.present[rows].copy()
        missing = []
        for stop in stops:
            first = max(0, stop - self.geometry.window_pages)
            missing.append(rows[first:stop][~present[first:stop]])
            present[first:stop] = True
        return missing

    def _reserve_on_host(
        self, rows: Rows, full: Rows, stops: tuple[int, ...], claim: Claim | None
    ) -> "_Reserved | DeclineReason":
        """Reserve as much of a backup as there is host room for; without a claim nothing gives
        way to it."""
        table = self.table
        # While room is made, what the backup needs must not be its victim; older windows
        # of the same path may be.
        needed = self._in_windows(rows, stops)
        guard = self._guard(rows, needed, claim)
        reserved = _Reserved(full[:0], full[:0], (), True)
        self._make_some_room(self.host, len(full), claim)
        if len(full) > (free := self._free(self.host, claim is not None)):
            # the beginning of it, up to where a request can resume
            self.counters.declined[DeclineReason.HOST_FULL] += 1
            if free == 0:
                guard.release()
                self._drop_unneeded(needed)
                return DeclineReason.HOST_FULL
            stops = self._stops(rows[: int(table.depth[full[free]])])
            full = self._leading_somewhere(rows, full[:free], stops)
            guard.release()
            needed = np.union1d(needed, self._in_windows(rows, stops))
            guard = self._guard(rows, needed, claim)
        reserved.done &= self._reserve(self.host, full)
        for missing in self._missing_windows(rows, stops):
            pinned = self._pinned_window_pages + len(reserved.window) + len(missing)
            if reserved.stops and pinned > self.policy.pinned_window_pages:
                break
            self._make_some_room(self.host_window, len(missing), claim)
            if len(missing) > self._free(self.host_window, claim is not None):
                self.counters.declined[DeclineReason.HOST_WINDOW_FULL] += 1
                break
            reserved.done &= self._reserve(self.host_window, missing)
            reserved.window = np.concatenate((reserved.window, missing))
            reserved.stops = stops[: len(reserved.stops) + 1]
        else:
            self._reserve_spare(rows, reserved)
        reserved.full = self._leading_somewhere(rows, full, reserved.stops)
        self._drop_rest(full, reserved.full)
        guard.release()
        self._drop_unneeded(needed)
        if len(reserved.full) == 0 and len(reserved.window) == 0:
            return DeclineReason.HOST_WINDOW_FULL if stops else DeclineReason.HOST_FULL
        return reserved

    def _make_some_room(self, space: HostSpace, pages: int, claim: Claim | None) -> None:
        """Free host pages for a backup. To one that is not needed yet gives way only what
        nobody has asked for, and with storage, what is there and on the device too."""
        if claim is not None:
            self._make_room(space, pages, claim)
            return
        other = self._sharing(space)
        while self.checkpoints.beyond and pages > self._free(space, needed_now=False):
            if not ((other is not None and self._vacate(other)) or self._drop_spare()):
                break
        if self.storage is not None:
            self._recycle(space, pages)

    def _reserve_spare(self, rows: Rows, reserved: "_Reserved") -> None:
        """Add windows inside a prompt that are kept as long as nothing else needs the room; not
        when more is taken than free, for then something else will need it soon."""
        both = (self.host, self.host_window)
        if self.policy.dense_pages == 0 or not _have_more_room_than_is_taken(both):
            return
        if len(self.checkpoints.beyond) >= _MOST_SPARE:
            self._drop_spare()
        table, size = self.table, self.geometry.window_pages
        usable = table.swa_host.present[rows] | table.swa_device.ready[rows]
        kept = self.checkpoints.ends[rows]
        kept[np.array(reserved.stops, dtype=np.int64) - 1] = True
        for stop in dense_points(kept, complete_windows(usable, size), self.policy.dense_pages):
            window = rows[max(0, stop - size) : stop]
            missing = window[~table.swa_host.present[window]]
            pinned = self._pinned_window_pages + len(reserved.window) + len(missing)
            room = self._free(self.host_window, needed_now=False)
            if pinned > self.policy.pinned_window_pages or len(missing) > room:
                break
            if not _have_more_room_than_is_taken(both):
                break
            reserved.done &= self._reserve(self.host_window, missing)
            reserved.window = np.concatenate((reserved.window, missing))
            reserved.stops, reserved.spare = (*reserved.stops, stop), (*reserved.spare, stop)

    def _guard(self, rows: Rows, needed: Rows, claim: Claim | None) -> Hold:
        """Holds what a backup needs; where nothing gives way to it, nothing has to be held."""
        if claim is None and self.storage is None and not self.checkpoints.beyond:
            return Hold()
        return Hold((self.table.host, rows), (self.table.swa_host, needed))

    def _drop_rest(self, reserved: Rows, kept: Rows) -> None:
        """Give back host pages that a backup has reserved and will not fill."""
        if len(kept) < len(reserved):
            self.host.drop(np.setdiff1d(reserved, kept))

    @staticmethod
    def _free(space: HostSpace, needed_now: bool) -> int:
        """Pages that a backup may take. One that is not needed yet leaves some for those
        that will be: they would only take its copies away again."""
        spare = 0 if needed_now else space.column.n_present // SPARE
        return max(0, space.free_pages - spare)

    def _reserve(self, space: HostSpace, rows: Rows) -> bool:
        if len(rows) == 0:
            return True
        slots, done = space.reserve(rows)
        space.column.put(rows, slots, ready=False)
        return done

    def _backlog_allows(self, pages: int, window_pages: int) -> bool:
        """Limits what backups copy, and what abandoned ones still occupy on the host."""
        if not self.pending[TransferKind.BACKUP]:
            return True
        pages += self._copied_pages
        windows = self._pinned_window_pages + window_pages
        return (
            pages + self.host.detached <= self.policy.pinned_pages
            and windows + self.host_window.detached <= self.policy.pinned_window_pages
        )

    # ---- end -----------------------------------------------------------------

    def _abandon(self, transfer: Transfer) -> None:
        """Give up a pending backup: its pages are free for eviction at once.

        The copy may still run and read what the engine writes there next, so it is
        never published, and its host slots are free after its commit only.
        """
        self._end_backup(transfer)
        table = self.table
        table.host.take(transfer.full.rows)
        table.swa_host.take(transfer.window.rows)
        self.host.detached += len(transfer.full)
        self.host_window.detached += len(transfer.window)
        self._drop_unneeded(self._in_windows(transfer.path, transfer.stops))
        transfer.abandoned = True
        self._scan_is_due = True
        self.counters.abandoned_transfers += 1

    def _end_backup(self, transfer: Transfer) -> None:
        transfer.hold.release()
        self._pins[transfer.path] -= 1
        self._copied_pages -= len(transfer.full)
        self._pinned_window_pages -= len(transfer.window)

    def commit_backup(self, op: int, *, ok: bool) -> None:
        """End a backup: its host copies become READY, or go away if it failed."""
        transfer = self.pending[TransferKind.BACKUP].pop(op)
        table = self.table
        if transfer.abandoned:
            self.host.detached -= len(transfer.full)
            self.host_window.detached -= len(transfer.window)
            self.host.release(transfer.full.host)
            self.host_window.release(transfer.window.host)
            return
        self._end_backup(transfer)
        if ok:
            table.host.make_ready(transfer.full.rows)
            table.swa_host.make_ready(transfer.window.rows)
            self._keep_windows(transfer.path, transfer.stops, transfer.spare)
            self.queue_persist(transfer.path)
            self.counters.backed_up_pages += len(transfer.full)
            self.counters.backed_up_window_pages += len(transfer.window)
        else:
            self.host.drop(transfer.full.rows)
            self.host_window.drop(transfer.window.rows)
            self.counters.failed_transfers += 1
            self._pause = STEPS_AFTER_A_FAILURE
            self._scan_is_due = True
        # a window can have lost pages that it shared with one whose backup failed
        self._drop_unneeded(self._in_windows(transfer.path, transfer.stops))


def _have_more_room_than_is_taken(spaces: tuple[HostSpace, ...]) -> bool:
    return all(space.free_pages >= space.column.n_present for space in spaces)


@dataclasses.dataclass(slots=True)
class _Reserved:
    """What of a backup there was host room for; RESERVED, and not held yet.

    Attributes:
        full, window: rows to copy.
        stops: resume points whose windows are whole with ``window``.
        spare: those of them for which there is room that nothing else needs.
        done: whether this rank's pools really gave slots.
    """

    full: Rows
    window: Rows
    stops: tuple[int, ...]
    done: bool
    spare: tuple[int, ...] = ()
