"""Where pages are: every change of that is made here."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.candidates import Candidates
from sglang_ext.core.compiled import copies
from sglang_ext.core.counters import Counters
from sglang_ext.core.host.compaction import Compaction
from sglang_ext.core.host.kept import Forgotten, KeptWindows
from sglang_ext.core.host.space import HostSpace, NoHost
from sglang_ext.core.host.tier import HostTier
from sglang_ext.core.plan import Hold
from sglang_ext.core.ports import Departures, DevicePool
from sglang_ext.core.table.columns import ABSENT, Rows, Slots
from sglang_ext.core.table.table import PageTable


class Residency:
    """The table, the slots of both tiers, and the windows that the host keeps.

    Attributes:
        table: rows and their columns.
        device_pool: device slots.
        tier: None without a host.
        host, host_window: host slots of each component; without a host there is no room.
        kept: windows that the host keeps.
        candidates: what may be evicted, dropped or copied next.
        counters: of the cache.
        departures: who is told which pages leave; None for nobody.
    """

    def __init__(
        self,
        table: PageTable,
        device: DevicePool,
        tier: HostTier | None,
        counters: Counters,
    ) -> None:
        self.table = table
        self.device_pool = device
        self.tier = tier
        self.counters = counters
        self.departures: Departures | None = None
        self.kept = KeptWindows(table, table.geometry.window_pages)
        self.candidates = Candidates(table, self.kept, has_host=tier is not None)
        nowhere = NoHost()
        shared = tier.shared if tier else None
        self.host, self.host_window = (
            HostSpace(column, pool, Compaction(shared, number, column) if shared else None)
            for number, (column, pool) in enumerate(
                (
                    (table.host, tier.full if tier else nowhere),
                    (table.swa_host, tier.window if tier else nowhere),
                )
            )
        )
        self._window_pages = table.geometry.window_pages

    def tell_departures(self, departures: Departures | None) -> None:
        """Tell somebody which pages leave, or nobody."""
        self.departures = departures

    # ---- use and hold --------------------------------------------------------

    def use(self, rows: Rows) -> None:
        """Record that a request uses the prefix ``rows`` and the window at its end."""
        if len(rows) == 0:
            return
        self.table.advance()
        self.refresh(rows)

    def refresh(self, rows: Rows) -> None:
        """A path is used now."""
        self.table.use(rows)
        self.used(rows)

    def used(self, rows: Rows) -> None:
        """The table has recorded that a path is used."""
        if self.tier is None:
            return  # there are victims alone, and they are looked at late
        self.candidates.note(rows)
        self.candidates.look_if_many()

    def window_of(self, rows: Rows) -> Rows:
        """The last window of a path: what resuming at its end reads."""
        return rows[max(0, len(rows) - self._window_pages) :]

    def in_windows(self, rows: Rows, stops: tuple[int, ...]) -> Rows:
        """Pages of the windows before resume points of a path, each once."""
        if len(stops) == 1:  # as most have
            return rows[max(0, stops[0] - self._window_pages) : stops[0]]
        if not stops:
            return rows[:0]
        inside = np.zeros(len(rows), dtype=bool)
        for stop in stops:
            inside[max(0, stop - self._window_pages) : stop] = True
        return rows[inside]

    def hold(self, rows: Rows) -> Hold:
        """Lock a path: full attention to the root, sliding window for its end."""
        table = self.table
        if len(rows) == 0:
            return Hold()
        return Hold((table.device, rows), (table.swa_device, self.window_of(rows)))

    # ---- slots of a request go to the table ----------------------------------

    def adopt(self, rows: Rows, full: Slots, swa: Slots) -> None:
        """Merge a request's slots into rows that exist."""
        table = self.table
        state = self.candidates.state
        there, windows = copies.already_there(state, rows, np.ascontiguousarray(swa))
        if there == windows == len(rows):  # the usual case: nothing is missing, all goes back
            self.device_pool.release_window(full, swa)
            self.device_pool.release(full)
            return
        missing = ~table.device.present[rows]
        if missing.any():
            self.give(rows[missing], full[missing], swa[missing])
            rows, full, swa = rows[~missing], full[~missing], swa[~missing]
        if len(rows) == 0:
            return
        # The rows keep their own full-attention slots: other requests may use
        # them. Only a missing sliding-window peer is taken from the request.
        live = swa[:, 0] != ABSENT
        revived = live & ~table.swa_device.present[rows]
        if revived.any():
            where = rows[revived]
            self.device_pool.move_window(full[revived], table.device.slots[where], swa[revived])
            table.swa_device.put(where, swa[revived], ready=True)
            live &= ~revived
        if live.all():
            self.device_pool.release_window(full, swa)
        elif live.any():
            self.device_pool.release_window(full[live], swa[live])
        self.device_pool.release(full)

    def give(self, rows: Rows, full: Slots, swa: Slots) -> None:
        """Give device slots to rows that have none; ``swa`` is ABSENT where there is no window."""
        table = self.table
        table.device.put(rows, full, ready=True)
        table.swa_device.put(rows, swa, ready=True)

    # ---- forget --------------------------------------------------------------

    def drop_device_windows(self, rows: Rows) -> int:
        """Take the windows of pages from the device; returns how many."""
        table = self.table
        if len(rows):
            self.counters.dropped_window_pages += len(rows)
            if self.tier is not None:
                on_host = int(np.count_nonzero(table.swa_host.present[rows]))
                self.counters.dropped_window_pages -= on_host
            swa = table.swa_device.take(rows)
            self.device_pool.release_window(table.device.slots[rows], swa)
        return len(rows)

    def remove(self, rows: Rows) -> tuple[int, int]:
        """Forget rows without a full copy, and everything below them.

        Returns:
            Device (pages, window pages) freed below ``rows``.
        """
        if len(rows) == 0:
            return 0, 0
        if self.tier is None:
            return len(rows), self._remove_from_device(rows)
        table = self.table
        rows = self.candidates.with_descendants(rows)
        if self.candidates.are_on_host_alone(rows):
            # most are: whatever else pages have would be looked for in vain
            if self.departures is not None:
                self.departures.forgotten(rows, table.host.ready[rows])
            self.host.drop(rows)
            self._forget(rows)
            return 0, 0
        device = rows[table.device.present[rows]]
        self.counters.unsaved_pages += int(np.count_nonzero(~table.host.ready[device]))
        return len(device), self._remove_everywhere(rows, device)

    def drop(self, rows: Rows) -> None:
        """Forget rows that no request and no transfer holds, whatever copies they have; all below
        them are among them."""
        if self.tier is None:
            self._remove_from_device(rows)
        else:
            self._remove_everywhere(rows, rows[self.table.device.present[rows]])

    def _remove_everywhere(self, rows: Rows, device: Rows) -> int:
        """Forget rows, of which ``device`` are on the device; returns how many windows they had
        there."""
        table, windows = self.table, 0
        assert not table.device.locks[rows].any(), "removed a locked page"
        if len(device):
            windows = self.drop_device_windows(device[table.swa_device.present[device]])
            self.device_pool.release(table.device.take(device))
        if self.departures is not None:
            self.departures.forgotten(rows, table.host.ready[rows])
        # storage may still read them: it holds their slots, see ``HostSpace.pin``
        table.host.break_locks(rows)
        table.swa_host.break_locks(rows)
        self.forget_windows(rows[self.kept.ends[rows]])
        self.host.drop(rows[table.host.present[rows]])
        self.candidates.note(rows)
        self._forget(rows)
        return windows

    def _remove_from_device(self, rows: Rows) -> int:
        """Forget rows where there is no host: all are on the device, and leaves go first. Returns
        how many windows they had."""
        device, windows = self.table.device, self.table.swa_device.present[rows]
        # of the same rows once and not twice is noted that they have changed
        dropped = self.drop_device_windows(rows if windows.all() else rows[windows])
        held = device.n_locked
        self.device_pool.release(device.take(rows))
        assert device.n_locked == held, "removed a locked page"
        if self.departures is not None:
            self.departures.forgotten(rows, self.table.host.ready[rows])
        self._forget(rows)
        return dropped

    def _forget(self, rows: Rows) -> None:
        """Rows without a copy leave the table."""
        self.table.remove_rows(rows)
        self.counters.dropped_pages += len(rows)

    def forget_windows(self, ends: Rows) -> int:
        """Keep windows on the host no longer; returns how many of their pages are free."""
        return sum(self.forget_window(end) for end in ends.tolist())

    def forget_window(self, end: int) -> int:
        """The same for one."""
        return self.drop_unneeded(self.kept.remove(end))

    def forget_tail(self, end: int) -> Forgotten:
        """Keep the last window of a prefix no longer; returns what is to be dropped with it. Those
        of several prefixes can be dropped together, which costs little more than one."""
        return self.kept.remove_tail(end, self.candidates.state)

    def are_in_use(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which kept windows (n, window_pages; -1 in front of shorter ones) cannot go now: a
        transfer or a pin has pages of it. Pinned ones that others need too stay with those."""
        held = (windows >= 0) & (self.table.swa_host.locks[windows] > 0)
        held &= ~(self.kept.pinned[windows] & (self.kept.uses[windows] > 1))
        in_use: NDArray[np.bool_] = np.logical_or.reduce(held, axis=1)
        return in_use

    def drop_unneeded(self, rows: Rows) -> int:
        """Drop window pages on the host that no kept window needs and no transfer uses."""
        if len(rows) == 0:
            return 0
        unneeded = np.empty(len(rows), dtype=np.int64)
        count: int = copies.unneeded(self.candidates.state, rows, unneeded)
        if count:
            self.host_window.drop(unneeded[:count])
        return count
