"""Room on the device: eviction, and what it does to copies elsewhere."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.backups import Backups
from sglang_ext.core.columns import Rows
from sglang_ext.core.compiled.constants import FREE, INSIDE_BAND
from sglang_ext.core.plan import Transfer, TransferKind
from sglang_ext.core.state import STEPS_KEPT
from sglang_ext.core.write_policy import worth_keeping

Flags = NDArray[np.bool_]


class DeviceRoom(Backups):
    """The part of the index that frees device pages."""

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
            (pages, window pages) freed; fewer than wanted when the rest is locked, more for
            the next evictions (see ``Spare``).
        """
        freed, freed_windows = self._evict_unlocked(pages, window_pages)
        backups = list(self.pending[TransferKind.BACKUP].values()) if abandon_backups else []
        while backups and (freed < pages or freed_windows < window_pages):
            last = backups.pop()
            if self._would_free(last, full=freed < pages, window=freed_windows < window_pages):
                self._abandon(last)
                more = self._evict_unlocked(pages - freed, window_pages - freed_windows)
                freed, freed_windows = freed + more[0], freed_windows + more[1]
        self._evicted += freed
        self._evicted_in_step += freed
        self._evicted_windows += freed_windows
        return freed, freed_windows

    def _would_free(self, backup: Transfer, *, full: bool, window: bool) -> bool:
        """Whether backups alone hold some of its pages, of a kind that is missing."""
        if backup.abandoned:
            return False
        locks = self.table.device.locks[backup.path]
        if full and (locks == self._pins[backup.path]).any():
            return True
        return window and bool((self.table.swa_device.locks[backup.window.rows] == 1).any())

    def _evict_unlocked(self, pages: int, window_pages: int) -> tuple[int, int]:
        freed = freed_windows = 0
        if pages > 0:
            rows = self._device_victims.first(pages + self.spare.beside(pages))
            rows = self._up_to_loss(rows, pages, self._loses_page)
            freed, freed_windows = self._demote(rows)
        if window_pages > freed_windows:
            wanted = window_pages - freed_windows
            rows = self._swa_device_victims.first(wanted + self.spare.beside_windows(wanted))
            rows = self._up_to_loss(rows, wanted, self._loses_window)
            freed_windows += self._drop_device_windows(rows)
        return freed, freed_windows

    def _up_to_loss(self, rows: Rows, wanted: int, loses: Callable[[Rows], Flags]) -> Rows:
        """The first ``wanted`` of ``rows``, and those behind them up to the first one that is
        nowhere else: with a host tier it may still be copied there."""
        if self.host_tier is None or len(rows) == wanted:
            return rows
        lost = loses(rows[wanted:])
        return rows[: wanted + int(lost.argmax())] if lost.any() else rows

    def _loses_page(self, rows: Rows) -> Flags:
        leads_on = self.table.host.ready[rows] & (self.checkpoints.below[rows] > 0)
        return ~leads_on | self._loses_window(rows)

    def _loses_window(self, rows: Rows) -> Flags:
        table = self.table
        kept = table.swa_host.ready[rows] & (self.checkpoints.uses[rows] > 0)
        # below that band are windows that no request resumes from
        lost: Flags = table.swa_device.present[rows] & ~kept & (table.swa_age[rows] >= INSIDE_BAND)
        return lost

    def _note_lost(self, rows: Rows) -> None:
        """Pages leave the device before they have been copied. If they were worth it, and the
        host did not just refuse, copies have to begin sooner for a while."""
        refused = self._pause or self.is_sampling
        if not refused and worth_keeping(self.policy.write, self.table.hits[rows]).any():
            self._steps_of_care = STEPS_KEPT

    def _demote(self, rows: Rows) -> tuple[int, int]:
        table = self.table
        windows = self._drop_device_windows(rows[table.swa_device.present[rows]])
        self.device_pool.release(table.device.take(rows))
        if self.host_tier is None:
            extra, extra_windows = self._remove(rows)
            return len(rows) + extra, windows + extra_windows
        on_host = table.host.present[rows]
        self._note_lost(rows[~on_host])
        self.counters.unsaved_pages += len(rows) - int(np.count_nonzero(on_host))
        extra, extra_windows = self._remove(rows[~on_host])
        # what leads to no window on the host cannot be resumed from there
        rest = rows[on_host & (table.parent[rows] != FREE)]
        leads_on = self.checkpoints.below[rest] > 0
        self._remove(rest[~leads_on])
        self.counters.demoted_pages += int(np.count_nonzero(leads_on))
        return len(rows) + extra, windows + extra_windows
