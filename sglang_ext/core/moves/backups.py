"""Backups, device to host: what is copied, room on the host, begin, abandon, commit."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator

import numpy as np

from sglang_ext.core.compiled import copies
from sglang_ext.core.compiled.copies import NOTHING_MISSING
from sglang_ext.core.device.demotion import worth_a_copy
from sglang_ext.core.device.look_ahead import STEPS_AFTER_A_FAILURE, LookAhead
from sglang_ext.core.host.own_room import OwnRoom
from sglang_ext.core.host.room import NEEDED_NOW, Claim, HostRoom
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.storage.persists import Persists
from sglang_ext.core.table.columns import Rows, resident_zeros
from sglang_ext.core.table.table import STORED
from sglang_ext.core.table.window import complete_windows, dense_points
from sglang_ext.core.write_policy import WritePolicy, pages_to_copy_now

_MOST_PATHS_A_STEP = 8
"""A step starts as many copies of each kind at most; the next one goes on."""
_MOST_LOOKED_AT = 64
"""Paths that may be looked at for that, as some have nothing that can be copied."""
_MOST_SPARE = 1024
"""Windows that are kept because there is room: all of them are looked at when it is needed."""
_MOST_LATE = 1024
"""Paths whose copy was put off; beyond, the oldest one waits until its eviction is near."""
_SAVED_AT_ONCE = 4
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NEVER = 1 << 62
_BACKLOG = Declined(DeclineReason.BACKLOG)


class Backups:
    """Fills the host tier.

    Attributes:
        pins: (table rows,) backups in flight that hold each page on the device.
    """

    def __init__(
        self,
        residency: Residency,
        room: HostRoom,
        own_room: OwnRoom,
        ahead: LookAhead,
        log: TransferLog,
        attachment: Attachment,
        persists: Persists,
        policy: BackupPolicy,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._host, self._host_window = residency.host, residency.host_window
        self._kept = residency.kept
        self._counters = residency.counters
        self._room = room
        self._own_room = own_room
        self._ahead = ahead
        self._log = log
        self._attachment = attachment
        self._persists = persists
        self._policy = policy
        self._window_pages = residency.table.geometry.window_pages
        self.pins = resident_zeros(residency.table.capacity, np.int16)
        # pages that are being copied
        self._copied_pages = self._pinned_window_pages = 0
        # (last row, its generation) of paths whose copy was due while others were being made
        self._late: deque[tuple[int, int]] = deque(maxlen=_MOST_LATE)
        # pages that were being copied when one of them was last refused
        self._refused_at = _NEVER

    def begin_for_request(self, rows: Rows) -> Transfer | Declined | None:
        """What the write policy copies to the host when a request has extended ``rows``.

        None: there is nothing to copy.
        """
        write = self._policy.write
        if write is WritePolicy.WRITE_BACK and self._is_device_tight():
            write = WritePolicy.WRITE_THROUGH
        rows = rows[: pages_to_copy_now(write, self._table.hits[rows])]
        if len(rows) == 0:
            return None
        plan = self._begin_early(rows)
        if plan == _BACKLOG:
            self._late.append((int(rows[-1]), int(self._table.generation[rows[-1]])))
        return plan

    def _is_device_tight(self) -> bool:
        """Whether running requests hold nearly all of the device: what they leave is needed at once
        when they end, and it is too late then to copy it ahead of its eviction."""
        free = self._residency.device_pool.free_pages() + self._table.device.n_evictable
        return free < self._ahead.low_pages()

    def _begin_early(self, rows: Rows) -> Transfer | Declined | None:
        """Copy a path before its eviction is near."""
        no_room = (
            not self._attachment.is_there and self._host.free_for_copies(needed_now=False) == 0
        )
        no_room &= len(self._kept.beyond) == 0
        absent = ~self._table.host.present[rows]
        if not no_room or not absent.any():
            return self.begin(rows, make_room=False)
        if self._policy.host_is_ample and self._is_device_tight() and not self._ahead.is_paused:
            # its eviction will be near as soon as its request has ended
            pages = rows[absent & self._ahead.are_worth(rows)]
            return self.begin(rows, make_room=True, pages=pages)
        # A copy that is not needed yet takes nothing away from those that are. That is the usual
        # answer where nothing comes twice, so it is given before anything is planned.
        return self._counters.decline(DeclineReason.HOST_FULL)

    def demote_ahead(self) -> list[Transfer]:
        """Start copies of what eviction takes next, if room gets low; once a step."""
        if self._residency.tier is None:
            return []
        pool = self._residency.device_pool
        free, free_windows = pool.free_pages(), pool.free_window_pages()
        self._ahead.note_step(free)
        if self._late:
            return self._catch_up()
        found = self._ahead.next(free, free_windows, self.pins)
        if found is None:
            return []
        table = self._table
        begun = self._begin_some(self._ahead.paths(found))
        ends = dict.fromkeys(found.window_end[found.window.dirty].tolist())
        begun += self._begin_some((table.path(end), _NO_ROWS) for end in ends)
        self._ahead.note_begun(found)
        return begun

    def _catch_up(self) -> list[Transfer]:
        """Start copies that were due while too many others were being made: what is in a hurry
        must not be lost for having come at a bad time."""
        begun: list[Transfer] = []
        if self._copied_pages >= self._refused_at:
            return begun
        self._refused_at = _NEVER
        for _ in range(min(len(self._late), _MOST_PATHS_A_STEP)):
            last, generation = self._late[0]
            if self._table.is_current(last, generation) and self._table.device.ready[last]:
                plan = self._begin_early(self._table.path(last))
                if plan == _BACKLOG:
                    self._refused_at = self._copied_pages
                    break
                if isinstance(plan, Transfer):
                    begun.append(plan)
            self._late.popleft()
        return begun

    def save_more(self, tried: set[int]) -> list[Transfer]:
        """Begin backups of what is on the device alone and worth keeping, the most recently
        used first: at shutdown, on the way to storage.

        Args:
            tried: ends of paths that were begun before; this adds to them.
        """
        table = self._table
        if self._attachment.is_suspended:
            return []
        ends = np.flatnonzero(table.resume & table.device.ready & (table.window_stored != STORED))
        ends = ends[worth_a_copy(table, self._policy.write, ends)]
        begun: list[Transfer] = []
        for end in ends[np.argsort(-table.age[ends])].tolist():
            if len(begun) == _SAVED_AT_ONCE:
                break
            if end not in tried:
                tried.add(end)
                path = table.path(end)
                plan = self.begin(path, make_room=True, claim=NEEDED_NOW)
                if isinstance(plan, Transfer):
                    begun.append(plan)
                elif plan is None:
                    self._persists.queue(path)
        return begun

    def _begin_some(self, paths: Iterator[tuple[Rows, Rows]]) -> list[Transfer]:
        """Backups of (path, pages) until there are enough for one step."""
        begun: list[Transfer] = []
        for path, pages in itertools.islice(paths, _MOST_LOOKED_AT):
            plan = self.begin(path, make_room=True, pages=pages)
            if isinstance(plan, Transfer):
                begun.append(plan)
            if len(begun) == _MOST_PATHS_A_STEP:
                break
        return begun

    def begin(
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
        table = self._table
        on_device = pages is None
        if pages is None:
            pages = rows
        elif self._attachment.is_there and len(pages):
            # storage has a page only behind all those in front of it
            above = rows[: int(table.depth[pages].max())]
            above = above[table.device.ready[above] & (table.stored[above] == 0)]
            pages = np.union1d(pages, above)
            pages = pages[np.argsort(table.depth[pages])]
        pages, stops, missing = self._plan(rows, pages, on_device=on_device)
        if len(pages) == 0 and missing == NOTHING_MISSING:
            if stops:
                self._keep_windows(rows, stops)
                self._persists.queue(rows)
            return None
        if not self._backlog_allows(len(pages), max(0, missing)):
            return self._counters.decline(DeclineReason.BACKLOG)
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
            (table.swa_host, self._residency.in_windows(rows, reserved.stops)),
        )
        self._copied_pages += len(full)
        self.pins[rows] += 1
        self._pinned_window_pages += len(window)
        return self._log.begin(
            TransferKind.BACKUP,
            Copies(full, table.device.slots[full], table.host.slots[full]),
            Copies(window, table.swa_device.slots[window], table.swa_host.slots[window]),
            hold,
            rows,
            stops=reserved.stops,
            spare=reserved.spare,
            failed_here=not reserved.done,
        )

    def _plan(
        self, rows: Rows, pages: Rows, *, on_device: bool = False
    ) -> tuple[Rows, tuple[int, ...], int]:
        """(those of ``pages`` on a path that have no copy and lead to a resume point on the host,
        resume points whose windows are to be kept there and are not yet, the deepest first; see
        ``copies.plan``). To be kept are windows that are worth it, and one without which the path
        could not be resumed at its end.

        Args:
            on_device: of the pages only those that are READY there.
        """
        if len(rows) == 0:
            return rows, (), NOTHING_MISSING
        # in storage a conversation goes on from the page before, for it takes no tails
        before_tail = (
            self._attachment.is_there and len(rows) > 1 and self._table.is_tail(int(rows[-1]))
        )
        full = np.empty(len(pages), dtype=np.int64)
        stops = np.empty(len(rows), dtype=np.int64)
        # windows that are worth a copy where there is room are copied as far as there is
        most = self._host_window.free_for_copies(needed_now=False)
        if self._own_room.is_on:
            most = self._own_room.windows_left(self._table.namespace(rows), most)
        count, n_stops, missing = copies.plan(
            self._residency.candidates.state,
            rows,
            pages,
            on_device,
            self._window_pages,
            most // self._window_pages,
            before_tail,
            full,
            stops,
        )
        return full[:count], tuple(stops[:n_stops].tolist()), missing

    def _leading_somewhere(self, rows: Rows, pages: Rows, stops: tuple[int, ...]) -> Rows:
        """Those of ``pages`` on a path that lead to a resume point on the host, if ``stops``
        are among them."""
        led = np.empty(len(pages), dtype=np.int64)
        state, deepest = self._residency.candidates.state, max(stops, default=0)
        return led[: copies.leading_somewhere(state, rows, pages, deepest, led)]

    def _keep_windows(
        self, path: Rows, stops: tuple[int, ...], spare: tuple[int, ...] = ()
    ) -> None:
        """Keep those windows whose pages are all on the host.

        Args:
            spare: those of ``stops`` for which there just was room.
        """
        kept, size = self._kept, self._window_pages
        for stop in stops:
            ready = self._table.swa_host.ready[path[max(0, stop - size) : stop]].all()
            if ready and not kept.ends[path[stop - 1]]:
                kept.add(path[:stop])
                if stop in spare:
                    kept.beyond.add(int(path[stop - 1]))

    def _missing_windows(self, rows: Rows, stops: tuple[int, ...]) -> Iterator[Rows]:
        """For each resume point the pages of its window to copy that no deeper one copies."""
        present = self._table.swa_host.present[rows]
        for stop in stops:
            first = max(0, stop - self._window_pages)
            yield rows[first:stop][~present[first:stop]]
            present[first:stop] = True

    def _reserve_on_host(
        self, rows: Rows, full: Rows, stops: tuple[int, ...], claim: Claim | None
    ) -> "_Reserved | DeclineReason":
        """Reserve as much of a backup as there is host room for; without a claim nothing gives
        way to it."""
        table = self._table
        # While room is made, what the backup needs must not be its victim; older windows
        # of the same path may be.
        needed = self._residency.in_windows(rows, stops)
        guard = self._guard(rows, needed, claim)
        reserved = _Reserved(full[:0], full[:0], (), True)
        first = next(self._missing_windows(rows, stops), _NO_ROWS)
        free, why = self._room_for(0, len(full), rows, claim, windows=len(first))
        if len(full) > free:
            # the beginning of it, up to where a request can resume
            self._counters.declined[why] += 1
            if free == 0:
                guard.release()
                self._residency.drop_unneeded(needed)
                return why
            full, stops, _ = self._plan(rows[: int(table.depth[full[free]])], full[:free])
            guard.release()
            needed = np.union1d(needed, self._residency.in_windows(rows, stops))
            guard = self._guard(rows, needed, claim)
        reserved.note(done=self._reserve(self._host, full))
        if stops:
            why = self._reserve_windows(rows, stops, claim, reserved)
        if len(reserved.stops) == len(stops):
            self._reserve_spare(rows, reserved)
        reserved.take(self._leading_somewhere(rows, full, reserved.stops))
        self._drop_rest(full, reserved.full)
        guard.release()
        self._residency.drop_unneeded(needed)
        if len(reserved.full) == 0 and len(reserved.window) == 0:
            if why is DeclineReason.QUOTA:
                return why
            return DeclineReason.HOST_WINDOW_FULL if stops else DeclineReason.HOST_FULL
        return reserved

    def _reserve_windows(
        self, rows: Rows, stops: tuple[int, ...], claim: Claim | None, reserved: "_Reserved"
    ) -> DeclineReason:
        """Add as many windows as there is room for, and as may be copied at a time, the first one
        in any case; what lacks if these are not all."""
        missing = list(self._missing_windows(rows, stops))
        # each of those that leave room for others leaves it, and none gives way in vain to a quota
        at_once = 1 if claim is None or self._own_room.is_on else len(missing)
        for begin in range(0, len(missing), at_once):
            some = missing[begin : begin + at_once]
            pages = np.cumsum([len(window) for window in some])
            left = self._policy.pinned_window_pages - self._pinned_window_pages
            count = int(np.searchsorted(pages, left - len(reserved.window), side="right"))
            if begin == 0:
                count = max(1, count)
            elif count == 0:
                break
            most = int(pages[count - 1])
            free, why = self._room_for(1, most, rows, claim, least=len(some[0]))
            fit = min(count, int(np.searchsorted(pages, free, side="right")))
            window = np.concatenate(some[:fit]) if fit else _NO_ROWS
            done = self._reserve(self._host_window, window)
            reserved.add_windows(window, stops[begin : begin + fit], done=done)
            if fit < count:
                self._counters.declined[why] += 1
            if fit < len(some):
                break
        return why

    def _room_for(
        self,
        number: int,
        pages: int,
        path: Rows,
        claim: Claim | None,
        *,
        windows: int = 0,
        least: int | None = None,
    ) -> tuple[int, DeclineReason]:
        """Pages of a component that a backup may take, of as many as it needs, when others have
        given way to it; and what it lacks if these are fewer.

        Args:
            number: of the component; 0 for full attention.
            windows: that its namespace is to have room for beside them.
            least: so many of them are of use; all unless told.
        """
        space, left = (self._host, self._host_window)[number], pages
        if self._own_room.is_on:
            namespace, limit = self._table.namespace(path), claim.worth if claim else None
            left = self._own_room.left(namespace, number, pages, limit, windows=windows)
            if left < pages and claim is not None and claim is not NEEDED_NOW:
                self._own_room.refuse(namespace)
        if left == pages or left > 0:
            self._make_room(space, left, claim, left if least is None else least)
        free = space.free_for_copies(needed_now=claim is not None)
        if left < pages and left <= free:
            return left, DeclineReason.QUOTA
        return free, (DeclineReason.HOST_FULL, DeclineReason.HOST_WINDOW_FULL)[number]

    def _make_room(self, space: HostSpace, pages: int, claim: Claim | None, least: int) -> None:
        """Free host pages for a backup; without a claim nothing is lost for it."""
        if claim is None:
            self._room.make_without_loss(space, pages, recycle=self._attachment.is_there)
            return
        freed = self._room.make(space, pages, claim)
        if not freed.is_enough and space.free_pages >= least:
            freed = dataclasses.replace(freed, pages=0)  # what was dropped is of use
        self._ahead.note_room(freed)

    def _reserve_spare(self, rows: Rows, reserved: "_Reserved") -> None:
        """Add windows inside a prompt that are kept as long as nothing else needs the room; not
        when more is taken than free, for then something else will need it soon."""
        table, size = self._table, self._window_pages
        both = (self._host, self._host_window)
        if self._policy.dense_pages == 0 or not _have_more_room_than_is_taken(both):
            return
        own = self._own_room
        if own.is_on and not own.has_more_than_is_taken(table.namespace(rows)):
            return
        if len(self._kept.beyond) >= _MOST_SPARE:
            self._room.drop_spare()
        usable = table.swa_host.present[rows] | table.swa_device.ready[rows]
        kept = self._kept.ends[rows]
        kept[np.array(reserved.stops, dtype=np.int64) - 1] = True
        for stop in dense_points(kept, complete_windows(usable, size), self._policy.dense_pages):
            window = rows[max(0, stop - size) : stop]
            missing = window[~table.swa_host.present[window]]
            pinned = self._pinned_window_pages + len(reserved.window) + len(missing)
            room = self._host_window.free_for_copies(needed_now=False)
            if pinned > self._policy.pinned_window_pages or len(missing) > room:
                break
            if not _have_more_room_than_is_taken(both):
                break
            if own.is_on and own.windows_left(table.namespace(rows), len(missing)) < len(missing):
                break
            done = self._reserve(self._host_window, missing)
            reserved.add_windows(missing, (stop,), done=done, are_spare=True)

    def _guard(self, rows: Rows, needed: Rows, claim: Claim | None) -> Hold:
        """Holds what a backup needs; where nothing gives way to it, nothing has to be held."""
        if claim is None and not self._attachment.is_there and not self._kept.beyond:
            return Hold()
        return Hold((self._table.host, rows), (self._table.swa_host, needed))

    def _drop_rest(self, reserved: Rows, kept: Rows) -> None:
        """Give back host pages that a backup has reserved and will not fill."""
        if len(kept) < len(reserved):
            self._host.drop(np.setdiff1d(reserved, kept))

    def _reserve(self, space: HostSpace, rows: Rows) -> bool:
        if len(rows) == 0:
            return True
        slots, done = space.reserve(rows)
        space.put(rows, slots, ready=False)
        return done

    def _backlog_allows(self, pages: int, window_pages: int) -> bool:
        """Limits what backups copy, and what abandoned ones still occupy on the host."""
        if not self._log.pending[TransferKind.BACKUP]:
            return True
        pages += self._copied_pages
        windows = self._pinned_window_pages + window_pages
        return (
            pages + self._host.detached <= self._policy.pinned_pages
            and windows + self._host_window.detached <= self._policy.pinned_window_pages
        )

    @property
    def n_late(self) -> int:
        """Paths whose copy was put off."""
        return len(self._late)

    # ---- end -----------------------------------------------------------------

    def abandon(self, transfer: Transfer) -> None:
        """Give up a pending backup: its pages are free for eviction at once.

        The copy may still run and read what the engine writes there next, so it is
        never published, and its host slots are free after its commit only.
        """
        self._end_backup(transfer)
        table = self._table
        table.host.take(transfer.full.rows)
        table.swa_host.take(transfer.window.rows)
        self._host.detach(len(transfer.full))
        self._host_window.detach(len(transfer.window))
        self._residency.drop_unneeded(self._residency.in_windows(transfer.path, transfer.stops))
        transfer.abandon()
        self._ahead.invalidate()
        self._counters.abandoned_transfers += 1

    def would_free(self, backup: Transfer, *, full: bool, window: bool) -> bool:
        """Whether backups alone hold some of its pages, of a kind that is missing."""
        if backup.abandoned:
            return False
        locks = self._table.device.locks[backup.path]
        if full and (locks == self.pins[backup.path]).any():
            return True
        return window and bool((self._table.swa_device.locks[backup.window.rows] == 1).any())

    def _end_backup(self, transfer: Transfer) -> None:
        transfer.hold.release()
        self.pins[transfer.path] -= 1
        self._copied_pages -= len(transfer.full)
        self._pinned_window_pages -= len(transfer.window)

    def commit(self, op: int, *, ok: bool) -> None:
        """End a backup: its host copies become READY, or go away if it failed."""
        transfer = self._log.end(TransferKind.BACKUP, op)
        table = self._table
        if transfer.abandoned:
            self._host.give_back(transfer.full.host)
            self._host_window.give_back(transfer.window.host)
            return
        self._end_backup(transfer)
        if ok:
            table.host.make_ready(transfer.full.rows)
            table.swa_host.make_ready(transfer.window.rows)
            self._keep_windows(transfer.path, transfer.stops, transfer.spare)
            self._persists.queue(transfer.path)
            self._counters.backed_up_pages += len(transfer.full)
            self._counters.backed_up_window_pages += len(transfer.window)
        else:
            self._host.drop(transfer.full.rows)
            self._host_window.drop(transfer.window.rows)
            self._counters.failed_transfers += 1
            self._ahead.pause(STEPS_AFTER_A_FAILURE)
            self._ahead.invalidate()
        # a window can have lost pages that it shared with one whose backup failed
        self._residency.drop_unneeded(self._residency.in_windows(transfer.path, transfer.stops))


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

    def note(self, *, done: bool) -> None:
        """Slots were asked for."""
        self.done &= done

    def add_windows(
        self, pages: Rows, stops: tuple[int, ...], *, done: bool, are_spare: bool = False
    ) -> None:
        """The windows before resume points are whole with these pages."""
        self.note(done=done)
        self.window = np.concatenate((self.window, pages)) if len(self.window) else pages
        self.stops += stops
        if are_spare:
            self.spare += stops

    def take(self, full: Rows) -> None:
        """These pages are copied."""
        self.full = full
