"""The cache index: match, insert, lock, evict, and transfers in two phases.

A transfer is *begun* (slots reserved, rows held), executed elsewhere, and
*committed*; nothing is published before its commit. The index decides and
accounts, it never copies a byte.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np

from sglang_ext.core.columns import ABSENT, Rows, Slots
from sglang_ext.core.counters import Counters
from sglang_ext.core.demotion import (
    clean_pages,
    oldest_dirty_paths,
    oldest_dirty_windows,
    worthless_windows,
)
from sglang_ext.core.digest import Pages
from sglang_ext.core.eviction import VictimQueue
from sglang_ext.core.geometry import Geometry
from sglang_ext.core.host_space import HostSpace
from sglang_ext.core.plan import (
    Copies,
    Declined,
    DeclineReason,
    Hold,
    PrefixMatch,
    Transfer,
    TransferKind,
)
from sglang_ext.core.ports import DevicePool, HostPool
from sglang_ext.core.table import PageTable, selector
from sglang_ext.core.window import checkpoint_windows, deepest_resume
from sglang_ext.core.write_policy import WritePolicy, pages_to_copy_now

_STEPS_AFTER_A_FAILURE = 32
"""How long copies ahead of eviction pause: a broken host must not keep us busy."""
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NO_SLOTS: Slots = np.empty(0, dtype=np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class HostTier:
    """The two host pools of a cache with a host tier."""

    full: HostPool
    window: HostPool


@dataclasses.dataclass(frozen=True, slots=True)
class BackupPolicy:
    """What is backed up when, and how much of the device that may hold up.

    Attributes:
        write: when a page is copied to the host.
        checkpoint_pages: distance of the windows kept inside a prompt.
        pinned_pages: device pages that pending backups may pin.
        pinned_window_pages: the same for sliding-window copies.
        low_pages: device pages that shall be free, or evictable without a loss;
            below that, the oldest pages are copied to the host.
        low_window_pages: the same for sliding-window copies.
    """

    write: WritePolicy
    checkpoint_pages: int
    pinned_pages: int
    pinned_window_pages: int
    low_pages: int
    low_window_pages: int


class CacheIndex:
    """The table, its victims and its transfers behind one facade."""

    def __init__(
        self,
        geometry: Geometry,
        capacity: int,
        device: DevicePool,
        host: HostTier | None = None,
        policy: BackupPolicy | None = None,
    ) -> None:
        self.geometry = geometry
        self.device_pool = device
        self.host_tier = host
        self.policy = policy or BackupPolicy(
            WritePolicy.WRITE_THROUGH, capacity, capacity, capacity, 0, 0
        )
        self.counters = Counters()
        self._capacity = capacity
        # operation numbers go on across a reset: they identify transfers for good
        self._next_op = dict.fromkeys(TransferKind, 0)
        self.reset()

    def reset(self) -> None:
        """Forget everything and free nothing; the pools are reset by their owners.

        No transfer may be in flight.
        """
        self.table = table = PageTable(self.geometry, self._capacity)
        self._device_victims = VictimQueue(table.device, table.age)
        self._swa_device_victims = VictimQueue(table.swa_device, table.swa_age)
        if (tier := self.host_tier) is not None:
            self.host = HostSpace(table, table.host, table.device, table.age, tier.full)
            self.host_window = HostSpace(
                table, table.swa_host, table.swa_device, table.swa_age, tier.window
            )
        self.pending: dict[TransferKind, dict[int, Transfer]] = {
            TransferKind.BACKUP: {},
            TransferKind.LOAD: {},
        }
        # backups that pin a page on the device, and how many pages have any
        self._pins = np.zeros(self._capacity, dtype=np.int16)
        self._pinned_pages = 0
        self._pinned_window_pages = 0
        self._room_left = 0
        self._pause = 0

    # ---- match ---------------------------------------------------------------

    def match(self, pages: Pages, namespace: Hashable) -> PrefixMatch:
        """Best resume point for a prompt of ``pages`` (n, page_tokens). Read-only."""
        table = self.table
        rows = table.lookup(pages, namespace)
        on_device = table.device.present[rows]
        device_pages = len(rows) if on_device.all() else int(on_device.argmin())
        swa_on_device = table.swa_device.present[rows]
        usable = swa_on_device | table.swa_host.ready[rows]
        best = deepest_resume(usable, self.geometry.window_pages)
        ready = deepest_resume(swa_on_device[:device_pages], self.geometry.window_pages)
        if ready >= best:
            return PrefixMatch(rows[:ready], ready, 0)
        window = rows[max(0, best - self.geometry.window_pages) : best]
        pinned = table.swa_device.present[window] & (table.swa_device.locks[window] > 0)
        return PrefixMatch(rows[:best], ready, len(window) - int(np.count_nonzero(pinned)))

    def use(self, rows: Rows) -> None:
        """Record that a request uses the prefix ``rows`` and the window at its end."""
        if len(rows) == 0:
            return
        self.table.advance()
        self._touch(rows)

    def _touch(self, rows: Rows) -> None:
        table = self.table
        table.touch(selector(rows))
        table.touch_window(selector(self.window_of(rows)))
        # who shares a prefix comes back to where it branches off when its own pages are gone
        for start, end in self._branch_windows(rows):
            table.touch_window(rows[start:end])

    def _branch_windows(self, rows: Rows) -> list[tuple[int, int]]:
        """Windows before the pages of a path after which prefixes diverge, as half-open
        ranges of ``rows``."""
        ends = np.flatnonzero(self.table.children[rows] > 1) + 1
        return [(max(0, end - self.geometry.window_pages), end) for end in ends.tolist()]

    def window_of(self, rows: Rows) -> Rows:
        """The last window of a path: what resuming at its end reads."""
        return rows[max(0, len(rows) - self.geometry.window_pages) :]

    # ---- lock ----------------------------------------------------------------

    def hold(self, rows: Rows) -> Hold:
        """Lock a path: full attention to the root, sliding window for its end."""
        table = self.table
        self._room_left -= len(rows)
        return Hold(
            (table.device, selector(rows)),
            (table.swa_device, selector(self.window_of(rows))),
        )

    # ---- insert --------------------------------------------------------------

    def insert(
        self,
        pages: Pages,
        namespace: Hashable,
        first_owned: int,
        full: Slots,
        swa: Slots,
        request: int,
    ) -> Rows:
        """Take over what a request computed and return the path of its prefix.

        Args:
            pages: (n, page_tokens) tokens of the request's whole prefix.
            namespace: what separates this prefix from equal tokens elsewhere.
            first_owned: pages ``[0, first_owned)`` already belong to the table, and
                the request holds a lock on them.
            full: device slots of pages ``[first_owned, n)``.
            swa: their sliding-window peers, ABSENT where the window has moved on.
            request: identifies the request among those of the last time.

        Returns:
            The rows of pages ``[0, k)``. k is n except after a digest collision;
            slots of pages ``[k, n)`` stay with the request. Slots of pages that the
            table already has on the device are given back here; the request must
            use the table's slots from now on.
        """
        table = self.table
        known = table.lookup(pages, namespace)
        assert len(known) >= first_owned, "a locked prefix left the table"
        table.advance()
        shared = known[first_owned:]
        self._adopt(shared, full[: len(shared)], swa[: len(shared)])
        added = _NO_ROWS
        if len(known) < len(pages):
            added = table.add_rows(known, pages[len(known) :], namespace)
            start = len(shared)
            stop = start + len(added)
            if stop < len(full):
                self.counters.collisions += 1
            self._give_device(added, full[start:stop], swa[start:stop])
        rows = np.concatenate((known, added)) if len(added) else known
        self._touch(rows)
        table.count_request(rows, request)
        self._room_left -= len(added)
        return rows

    def _adopt(self, rows: Rows, full: Slots, swa: Slots) -> None:
        """Merge a request's slots into rows that exist."""
        table = self.table
        missing = ~table.device.present[rows]
        if missing.any():
            self._give_device(rows[missing], full[missing], swa[missing])
            rows, full, swa = rows[~missing], full[~missing], swa[~missing]
        if len(rows) == 0:
            return
        # The rows keep their own full-attention slots: other requests may use
        # them. Only a missing sliding-window peer is taken from the request.
        live = swa[:, 0] != ABSENT
        revived = live & ~table.swa_device.present[rows]
        duplicate = live & ~revived
        if revived.any():
            where = rows[revived]
            self.device_pool.move_window(full[revived], table.device.slots[where], swa[revived])
            table.swa_device.put(where, swa[revived], ready=True)
        if duplicate.any():
            self.device_pool.release_window(full[duplicate], swa[duplicate])
        self.device_pool.release(full)

    def _give_device(self, rows: Rows, full: Slots, swa: Slots) -> None:
        table = self.table
        table.device.put(selector(rows), full, ready=True)
        live = swa[:, 0] != ABSENT
        if live.all():
            table.swa_device.put(selector(rows), swa, ready=True)
        elif live.any():
            table.swa_device.put(rows[live], swa[live], ready=True)

    # ---- evict ---------------------------------------------------------------

    def evict_device(
        self, pages: int, window_pages: int, *, abandon_backups: bool = False
    ) -> tuple[int, int]:
        """Free device pages. A page with a host copy stays matchable from there.

        Args:
            pages: full-attention pages wanted (their peers go with them).
            window_pages: sliding-window pages wanted, those peers included.
            abandon_backups: if the rest is held, take back pages that pending
                backups hold, the last begun first, rather than fail or wait.

        Returns:
            (pages, window pages) freed; fewer than wanted when the rest is locked.
        """
        freed, freed_windows = self._evict_unlocked(pages, window_pages)
        backups = list(self.pending[TransferKind.BACKUP].values()) if abandon_backups else []
        while backups and (freed < pages or freed_windows < window_pages):
            if (last := backups.pop()).abandoned:
                continue
            self._abandon(last)
            more = self._evict_unlocked(pages - freed, window_pages - freed_windows)
            freed, freed_windows = freed + more[0], freed_windows + more[1]
        return freed, freed_windows

    def _evict_unlocked(self, pages: int, window_pages: int) -> tuple[int, int]:
        freed = freed_windows = 0
        if pages > 0:
            freed, freed_windows = self._demote(self._device_victims.pop(pages))
        if window_pages > freed_windows:
            rows = self._swa_device_victims.pop(window_pages - freed_windows)
            freed_windows += self._drop_device_windows(rows)
        return freed, freed_windows

    def _demote(self, rows: Rows) -> tuple[int, int]:
        table = self.table
        windows = self._drop_device_windows(rows[table.swa_device.present[rows]])
        self.device_pool.release(table.device.take(rows))
        on_host = table.host.present[rows]
        table.host.offer(rows[on_host])
        lost = rows[~on_host]
        self.counters.demoted_pages += int(np.count_nonzero(on_host))
        extra, extra_windows = self._remove(lost) if len(lost) else (0, 0)
        return len(rows) + extra, windows + extra_windows

    def _drop_device_windows(self, rows: Rows) -> int:
        table = self.table
        if len(rows):
            lost = ~table.swa_host.present[rows]
            self.counters.dropped_window_pages += int(np.count_nonzero(lost))
            swa = table.swa_device.take(rows)
            self.device_pool.release_window(table.device.slots[rows], swa)
            table.swa_host.offer(rows[~lost])
        return len(rows)

    def _remove(self, rows: Rows) -> tuple[int, int]:
        """Forget rows without a full copy, and everything below them.

        Returns:
            Device (pages, window pages) freed below ``rows``.
        """
        table = self.table
        rows = table.subtree(rows)
        assert not table.device.locks[rows].any(), "removed a locked page"
        device = rows[table.device.present[rows]]
        windows = self._drop_device_windows(rows[table.swa_device.present[rows]])
        if len(device):
            self.device_pool.release(table.device.take(device))
        if self.host_tier is not None:
            self.host.drop(rows[table.host.present[rows]])
            self.host_window.drop(rows[table.swa_host.present[rows]])
        table.remove_rows(rows)
        self.counters.dropped_pages += len(rows)
        return len(device), windows

    def _evict_host(self, pages: int, younger_than: int) -> None:
        """Make room on the host: copies of pages that are on the device, then the oldest."""
        duplicates = len(self.host.pop_duplicates(pages, younger_than))
        self.counters.reclaimed_duplicate_pages += duplicates
        rows = self.host.pop_oldest(pages - duplicates)
        self.counters.evicted_host_pages += len(rows)
        lost = rows[~self.table.device.present[rows]]
        if len(lost):
            self._remove(lost)

    def _evict_host_windows(self, pages: int, younger_than: int) -> None:
        duplicates = len(self.host_window.pop_duplicates(pages, younger_than))
        self.counters.reclaimed_duplicate_window_pages += duplicates
        rows = self.host_window.pop_oldest(pages - duplicates)
        self.counters.evicted_host_window_pages += len(rows)

    # ---- backup --------------------------------------------------------------

    def begin_backup(self, rows: Rows) -> Transfer | Declined | None:
        """What the write policy copies to the host when a request has extended ``rows``.

        None: there is nothing to copy.
        """
        rows = rows[: pages_to_copy_now(self.policy.write, self.table.hits[rows])]
        # a copy that is not needed yet takes nothing away from those that are
        return self._begin_backup(rows, make_room=False) if len(rows) else None

    def demote_ahead(self) -> list[Transfer]:
        """Start copies of what eviction takes next, if room gets low; once a step."""
        if self.host_tier is None or self._room_left > 0:
            return []
        if self._pause > 0:
            self._pause -= 1
            return []
        table, policy = self.table, self.policy
        room = self.device_pool.free_pages() + clean_pages(table.device, table.host)
        window_room = (
            self.device_pool.free_window_pages()
            + clean_pages(table.swa_device, table.swa_host)
            + worthless_windows(table)
        )
        begun: list[Transfer] = []
        for path in oldest_dirty_paths(table, policy.write, policy.low_pages - room):
            plan = self._begin_backup(path, make_room=True)
            if not isinstance(plan, Transfer):
                break
            begun.append(plan)
        size = self.geometry.window_pages
        wanted = policy.low_window_pages - window_room
        for path in oldest_dirty_windows(table, policy.write, size, wanted):
            plan = self._begin_backup(path, make_room=True, windows_only=True)
            if not isinstance(plan, Transfer):
                break
            begun.append(plan)
        # as long as less than this is allocated or locked, there is nothing to look for
        self._room_left = min(room - policy.low_pages, window_room - policy.low_window_pages)
        return begun

    def _begin_backup(
        self, rows: Rows, *, make_room: bool, windows_only: bool = False
    ) -> Transfer | Declined | None:
        """Start to copy a path to the host: its pages, and the windows worth keeping.

        Pages are copied from the root on. A window is copied whole or not at all.
        """
        table = self.table
        full = rows[~table.host.present[rows] & table.device.ready[rows]]
        if windows_only:
            full = _NO_ROWS
        windows = self._windows_to_back_up(rows, len(full))
        if len(full) == 0 and not windows:
            return None
        at_end = windows[0].stop - windows[0].start if windows else 0
        if not self._backlog_allows(rows, at_end):
            return self._decline(DeclineReason.BACKLOG)
        full, window = self._make_host_room(rows, full, windows, make_room)
        if len(full) == 0 and len(window) == 0:
            return Declined(DeclineReason.HOST_FULL)
        full_slots, full_ok = self.host.reserve(full)
        window_slots, window_ok = self.host_window.reserve(window)
        table.host.put(full, full_slots, ready=False)
        table.swa_host.put(window, window_slots, ready=False)
        hold = Hold(
            (table.device, selector(rows)),
            (table.swa_device, window),
            (table.host, full),
            (table.swa_host, window),
        )
        self._pinned_pages += int(np.count_nonzero(self._pins[rows] == 0))
        self._pins[rows] += 1
        self._pinned_window_pages += len(window)
        transfer = self._begin(
            TransferKind.BACKUP,
            Copies(full, table.device.slots[full], full_slots),
            Copies(window, table.swa_device.slots[window], window_slots),
            hold,
            rows,
        )
        transfer.failed_here = not (full_ok and window_ok)
        return transfer

    def _windows_to_back_up(self, rows: Rows, new_pages: int) -> list[slice]:
        """Windows of ``rows`` that are complete and not on the host, the last one first."""
        table = self.table
        on_host = table.swa_host.present[rows].copy()
        usable = on_host | table.swa_device.ready[rows]
        windows = []
        first = len(rows) - max(new_pages, 1)
        at_end, *inside = checkpoint_windows(
            first, len(rows), self.policy.checkpoint_pages, self.geometry.window_pages
        )
        for start, end in (at_end, *self._branch_windows(rows), *inside):
            if usable[start:end].all() and not on_host[start:end].all():
                windows.append(slice(start, end))
                on_host[start:end] = True
        return windows

    def _backlog_allows(self, rows: Rows, window_pages: int) -> bool:
        if not self.pending[TransferKind.BACKUP]:
            return True
        pages = self._pinned_pages + int(np.count_nonzero(self._pins[rows] == 0))
        return (
            pages <= self.policy.pinned_pages
            and self._pinned_window_pages + window_pages <= self.policy.pinned_window_pages
        )

    def _make_host_room(
        self, rows: Rows, full: Rows, windows: list[slice], make_room: bool
    ) -> tuple[Rows, Rows]:
        """As much of a backup as there is host room for: (full rows, window rows)."""
        table = self.table
        # While room is made, what the backup needs must not be its victim; older windows
        # of the same path may be.
        needed = np.unique(np.concatenate([_NO_ROWS, *(rows[window] for window in windows)]))
        guard = Hold((table.host, selector(rows)), (table.swa_host, needed))
        if make_room and len(full) > self.host.free_pages:
            self._evict_host(len(full) - self.host.free_pages, int(table.age[rows[-1]]))
        if len(full) > self.host.free_pages:
            self.counters.declined[DeclineReason.HOST_FULL] += 1
            full, windows = full[: self.host.free_pages], []
        kept = _NO_ROWS
        for number, window in enumerate(windows):
            missing = rows[window][~table.swa_host.present[rows[window]]]
            added = np.setdiff1d(missing, kept)
            size = len(kept) + len(added)
            if number > 0 and self._pinned_window_pages + size > self.policy.pinned_window_pages:
                break
            if make_room and size > self.host_window.free_pages:
                age = int(table.swa_age[rows[window.stop - 1]])
                self._evict_host_windows(size - self.host_window.free_pages, age)
            if size > self.host_window.free_pages:
                self.counters.declined[DeclineReason.HOST_WINDOW_FULL] += 1
                break
            kept = np.concatenate((kept, added))
        guard.release()
        return full, kept

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
        transfer.abandoned = True
        self.counters.abandoned_transfers += 1

    def _end_backup(self, transfer: Transfer) -> None:
        transfer.hold.release()
        self._pins[transfer.path] -= 1
        self._pinned_pages -= int(np.count_nonzero(self._pins[transfer.path] == 0))
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
            self.counters.backed_up_pages += len(transfer.full)
            self.counters.backed_up_window_pages += len(transfer.window)
        else:
            self.host.drop(transfer.full.rows)
            self.host_window.drop(transfer.window.rows)
            self.counters.failed_transfers += 1
            self._pause = _STEPS_AFTER_A_FAILURE

    # ---- load back -----------------------------------------------------------

    def begin_load(self, rows: Rows) -> Transfer | Declined:
        """Start to bring a matched path to the device: what is missing of its pages
        and of its last window.

        The device slots are in the table at once (RESERVED): the engine orders
        every reader behind the load that it submitted.
        """
        table, pool = self.table, self.device_pool
        full = rows[~table.device.present[rows]]
        window = self.window_of(rows)
        window = window[~table.swa_device.present[window]]
        if not (table.host.ready[full].all() and table.swa_host.ready[window].all()):
            return self._decline(DeclineReason.STALE)
        hold = Hold(
            (table.device, selector(rows)),
            (table.swa_device, selector(self.window_of(rows))),
            (table.host, full),
            (table.swa_host, window),
        )
        full_slots, window_slots = self._allocate_device(len(full), len(window))
        if full_slots is None or window_slots is None:
            hold.release()
            return self._decline(DeclineReason.DEVICE_FULL)
        table.device.put(full, full_slots, ready=False)
        table.swa_device.put(window, window_slots, ready=False)
        pool.bind_window(table.device.slots[window], window_slots)
        self.use(rows)
        return self._begin(
            TransferKind.LOAD,
            Copies(full, full_slots, table.host.slots[full]),
            Copies(window, window_slots, table.swa_host.slots[window]),
            hold,
            rows,
        )

    def _allocate_device(self, pages: int, window_pages: int) -> tuple[Slots | None, Slots | None]:
        pool = self.device_pool
        self.evict_device(
            max(0, pages - pool.free_pages()),
            max(0, window_pages - pool.free_window_pages()),
        )
        if pool.free_pages() < pages or pool.free_window_pages() < window_pages:
            return None, None
        full = pool.allocate(pages)
        if full is None:
            return None, None
        window = pool.allocate_window(window_pages)
        if window is None:
            pool.release(full)
        return full, window

    def commit_load(self, op: int) -> None:
        """End a load: its device copies are READY."""
        transfer = self.pending[TransferKind.LOAD].pop(op)
        transfer.hold.release()
        self.table.device.make_ready(transfer.full.rows)
        self.table.swa_device.make_ready(transfer.window.rows)
        self.counters.loaded_pages += len(transfer.full)
        self.counters.loaded_window_pages += len(transfer.window)

    # ---- shared --------------------------------------------------------------

    def last_op(self, kind: TransferKind) -> int:
        """Number of the last transfer begun in a direction, -1 before the first."""
        return self._next_op[kind] - 1

    def _begin(
        self, kind: TransferKind, full: Copies, window: Copies, hold: Hold, path: Rows
    ) -> Transfer:
        op = self._next_op[kind]
        self._next_op[kind] = op + 1
        transfer = Transfer(op, kind, full, window, hold, path)
        self.pending[kind][op] = transfer
        return transfer

    def _decline(self, reason: DeclineReason) -> Declined:
        self.counters.declined[reason] += 1
        return Declined(reason)
