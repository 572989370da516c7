"""Backups, device to host: what is copied, room on the host, begin, abandon, commit."""

import itertools

import numpy as np

from sglang_ext.core.columns import Rows
from sglang_ext.core.demotion import look_ahead, paths_of_pages, paths_of_windows, worth_a_copy
from sglang_ext.core.host_room import HostRoom
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind
from sglang_ext.core.table import selector
from sglang_ext.core.window import checkpoint_windows
from sglang_ext.core.write_policy import pages_to_copy_now

_STEPS_AFTER_A_FAILURE = 32
"""How long copies ahead of eviction pause: a broken host must not keep us busy."""
_MOST_PATHS_A_STEP = 8
"""A step starts as many copies of each kind at most; the next one goes on."""
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class Backups(HostRoom):
    """The part of the index that fills the host tier."""

    def begin_backup(self, rows: Rows) -> Transfer | Declined | None:
        """What the write policy copies to the host when a request has extended ``rows``.

        None: there is nothing to copy.
        """
        rows = rows[: pages_to_copy_now(self.policy.write, self.table.hits[rows])]
        # a copy that is not needed yet takes nothing away from those that are
        return self._begin_backup(rows, make_room=False) if len(rows) else None

    def demote_ahead(self) -> list[Transfer]:
        """Start copies of what eviction takes next, if room gets low; once a step."""
        if self.host_tier is None or not self._room_may_be_low():
            return []
        if self._pause > 0:
            self._pause -= 1
            return []
        full, window = self._look_ahead()
        paths = paths_of_pages(self.table, full)
        windows = paths_of_windows(self.table, window, self.geometry.window_pages)
        plans = [
            self._begin_backup(path, make_room=True, pages=pages)
            for path, pages in itertools.islice(paths, _MOST_PATHS_A_STEP)
        ]
        plans += [
            self._begin_backup(path, make_room=True, pages=_NO_ROWS)
            for path in itertools.islice(windows, _MOST_PATHS_A_STEP)
        ]
        return [plan for plan in plans if isinstance(plan, Transfer)]

    def _look_ahead(self) -> tuple[Rows, Rows]:
        """(pages, window pages) to copy, oldest first. O(rows)."""
        table, pool, policy = self.table, self.device_pool, self.policy
        self._free_at_scan = pool.free_pages()
        self._free_windows_at_scan = pool.free_window_pages()
        self._evicted = self._evicted_windows = self._held = 0
        self._scan_is_due = False
        keep = worth_a_copy(table, policy.write)
        full = look_ahead(
            table.device,
            table.host,
            table.age,
            keep,
            self._pins,
            self._free_at_scan,
            policy.low_pages,
        )
        window = look_ahead(
            table.swa_device,
            table.swa_host,
            table.swa_age,
            keep & (table.swa_age >= 0),
            1,
            self._free_windows_at_scan,
            policy.low_window_pages,
        )
        self._room_left, self._window_room_left = full.room, window.room
        return full.dirty, window.dirty

    def _room_may_be_low(self) -> bool:
        """Whether a scan could find too little room: what was allocated and locked since
        the last one is as much as there was above the low marks."""
        if self._scan_is_due:
            return True
        pool = self.device_pool
        used = self._free_at_scan + self._evicted - pool.free_pages()
        windows = self._free_windows_at_scan + self._evicted_windows - pool.free_window_pages()
        left = min(self._room_left - used, self._window_room_left - windows)
        return left <= self._held

    def _begin_backup(
        self, rows: Rows, *, make_room: bool, pages: Rows | None = None
    ) -> Transfer | Declined | None:
        """Start to copy pages of a path to the host, and the windows worth keeping.

        A window is copied whole or not at all.

        Args:
            rows: the path.
            make_room: whether other host copies may give way.
            pages: those of ``rows`` to copy; None for all without a host copy.
        """
        table = self.table
        full = pages
        if full is None:
            full = rows[~table.host.present[rows] & table.device.ready[rows]]
        windows = self._windows_to_back_up(rows, len(full))
        if len(full) == 0 and not windows:
            return None
        at_end = windows[0].stop - windows[0].start if windows else 0
        if not self._backlog_allows(rows, at_end):
            return self._decline(DeclineReason.BACKLOG)
        full, window, reserved = self._reserve_on_host(rows, full, windows, make_room)
        if len(full) == 0 and len(window) == 0:
            only_windows = pages is not None and len(pages) == 0
            return Declined(
                DeclineReason.HOST_WINDOW_FULL if only_windows else DeclineReason.HOST_FULL
            )
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
            Copies(full, table.device.slots[full], table.host.slots[full]),
            Copies(window, table.swa_device.slots[window], table.swa_host.slots[window]),
            hold,
            rows,
        )
        transfer.failed_here = not reserved
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
        """Limits what backups pin, and what abandoned ones still occupy on the host."""
        if not self.pending[TransferKind.BACKUP]:
            return True
        pages = self._pinned_pages + int(np.count_nonzero(self._pins[rows] == 0))
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
        transfer.abandoned = True
        self._scan_is_due = True
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
            self._scan_is_due = True
