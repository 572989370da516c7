"""Loads, host to device: a matched path and its last window come back."""

from sglang_ext.core.columns import Rows, Slots
from sglang_ext.core.device_room import DeviceRoom
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind


class Loads(DeviceRoom):
    """The part of the index that brings pages back."""

    def begin_load(self, rows: Rows) -> Transfer | Declined:
        """Start to bring a matched path to the device: what is missing of its pages
        and of its last window.

        The device slots are in the table at once (RESERVED): the engine orders
        every reader behind the load that it submitted.
        """
        table, pool = self.table, self.device_pool
        # prefixes come back: those that were passed over need their copies now
        self._scan_is_due |= self.is_sampling
        self._sampling.lost = 0
        full = rows[~table.device.present[rows]]
        window = self.window_of(rows)
        window = window[~table.swa_device.present[window]]
        if not (table.host.ready[full].all() and table.swa_host.ready[window].all()):
            return self._decline(DeclineReason.STALE)
        hold = Hold(
            (table.device, rows),
            (table.swa_device, self.window_of(rows)),
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
        self._drop_unneeded(transfer.window.rows)
        self.table.device.make_ready(transfer.full.rows)
        self.table.swa_device.make_ready(transfer.window.rows)
        self.counters.loaded_pages += len(transfer.full)
        self.counters.loaded_window_pages += len(transfer.window)
