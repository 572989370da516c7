"""Loads, host to device: a matched path and its last window come back."""

from sglang_ext.core.device.eviction import DeviceEviction
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.host.sampling import Sampling
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows, Slots


class Loads:
    """Brings pages back to the device."""

    def __init__(
        self,
        residency: Residency,
        eviction: DeviceEviction,
        ahead: LookAhead,
        log: TransferLog,
        sampling: Sampling,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._pool = residency.device_pool
        self._counters = residency.counters
        self._eviction = eviction
        self._ahead = ahead
        self._log = log
        self._sampling = sampling

    def begin(self, rows: Rows) -> Transfer | Declined:
        """Start to bring a matched path to the device: what is missing of its pages
        and of its last window.

        The device slots are in the table at once (RESERVED): the engine orders
        every reader behind the load that it submitted.
        """
        table, pool = self._table, self._pool
        # prefixes come back: those that were passed over need their copies now
        if self._sampling.is_on:
            self._ahead.invalidate()
        self._sampling.note_read()
        full = rows[~table.device.present[rows]]
        window = self._residency.window_of(rows)
        window = window[~table.swa_device.present[window]]
        if not (table.host.ready[full].all() and table.swa_host.ready[window].all()):
            return self._counters.decline(DeclineReason.STALE)
        hold = Hold(
            (table.device, rows),
            (table.swa_device, self._residency.window_of(rows)),
            (table.host, full),
            (table.swa_host, window),
        )
        full_slots, window_slots = self._allocate_device(len(full), len(window))
        if full_slots is None or window_slots is None:
            hold.release()
            return self._counters.decline(DeclineReason.DEVICE_FULL)
        table.device.put(full, full_slots, ready=False)
        table.swa_device.put(window, window_slots, ready=False)
        pool.bind_window(table.device.slots[window], window_slots)
        self._residency.use(rows)
        return self._log.begin(
            TransferKind.LOAD,
            Copies(full, full_slots, table.host.slots[full]),
            Copies(window, window_slots, table.swa_host.slots[window]),
            hold,
            rows,
        )

    def _allocate_device(self, pages: int, window_pages: int) -> tuple[Slots | None, Slots | None]:
        pool = self._pool
        self._eviction.evict(
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

    def commit(self, op: int) -> None:
        """End a load: its device copies are READY."""
        transfer = self._log.end(TransferKind.LOAD, op)
        transfer.hold.release()
        self._residency.drop_unneeded(transfer.window.rows)
        self._table.device.make_ready(transfer.full.rows)
        self._table.swa_device.make_ready(transfer.window.rows)
        self._counters.loaded_pages += len(transfer.full)
        self._counters.loaded_window_pages += len(transfer.window)
