"""Eviction from the device, and what it does to copies elsewhere."""

import numpy as np

from sglang_ext.core.candidates import Kind
from sglang_ext.core.compiled import copies as loops
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.device.victims import Spare
from sglang_ext.core.host.sampling import Sampling
from sglang_ext.core.moves.backups import Backups
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.retention.expiry import Expiry, NoExpiry
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.write_policy import WritePolicy, worth_keeping

COMPARED = 32
"""Of so many times the pages that have to go, those go that are worth least."""


class DeviceEviction:
    """Frees device pages.

    Args:
        spare: what evictions may free beyond what is asked for.
    """

    def __init__(
        self,
        residency: Residency,
        backups: Backups,
        ahead: LookAhead,
        log: TransferLog,
        sampling: Sampling,
        write: WritePolicy,
        spare: Spare,
        expiry: Expiry | NoExpiry,
    ) -> None:
        table = residency.table
        self._residency = residency
        self._table = table
        self._kept = residency.kept
        self._counters = residency.counters
        self._backups = backups
        self._ahead = ahead
        self._log = log
        self._sampling = sampling
        self._write = write
        self._spare = spare
        self._expiry = expiry
        self._candidates = residency.candidates

    def evict(
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
        backups = list(self._log.pending[TransferKind.BACKUP].values()) if abandon_backups else []
        while backups and (freed < pages or freed_windows < window_pages):
            last = backups.pop()
            if self._backups.would_free(
                last, full=freed < pages, window=freed_windows < window_pages
            ):
                self._backups.abandon(last)
                more = self._evict_unlocked(pages - freed, window_pages - freed_windows)
                freed, freed_windows = freed + more[0], freed_windows + more[1]
        self._ahead.note_evicted(freed, freed_windows)
        return freed, freed_windows

    def _evict_unlocked(self, pages: int, window_pages: int) -> tuple[int, int]:
        freed = freed_windows = 0
        if pages > 0:
            rows = self._victims(pages + self._spare.beside(pages))
            rows = self._up_to_loss(rows, pages, windows_alone=False)
            freed, freed_windows = self._demote(rows)
        if window_pages > freed_windows:
            wanted = window_pages - freed_windows
            more = wanted + self._spare.beside_windows(wanted)
            rows = self._candidates.first(Kind.WINDOW_VICTIMS, more)
            rows = self._up_to_loss(rows, wanted, windows_alone=True)
            self._tell(rows, windows=True)
            freed_windows += self._residency.drop_device_windows(rows)
        return freed, freed_windows

    def _victims(self, pages: int) -> Rows:
        """Who goes next. Above a host all go in the order that copies are made in."""
        if self._residency.tier is not None or not self._expiry.is_learned:
            return self._candidates.first(Kind.VICTIMS, pages)
        next_ones = self._candidates.first(Kind.VICTIMS, COMPARED * pages)
        return self._expiry.least_worth(next_ones, pages)

    def _up_to_loss(self, rows: Rows, wanted: int, *, windows_alone: bool) -> Rows:
        """The first ``wanted`` of ``rows``, and those behind them up to the first one that is
        nowhere else: with a host tier it may still be copied there."""
        if self._residency.tier is None or len(rows) <= wanted:
            return rows
        places = np.empty(len(rows), dtype=np.int64)
        count = loops.lost(self._candidates.state, rows, wanted, windows_alone, places)
        if count == 0:
            return rows
        admitted = self._expiry.admits(rows[places[:count]])
        return rows[: int(places[admitted.argmax()])] if admitted.any() else rows

    def _tell(self, rows: Rows, *, windows: bool) -> None:
        if (departures := self._residency.departures) is not None and len(rows):
            departures.left_device(rows, windows=windows)

    def _note_lost(self, rows: Rows) -> None:
        """Pages leave the device before they have been copied. If they were worth it, and the
        host did not just refuse, copies have to begin sooner for a while."""
        if self._ahead.is_paused or self._sampling.is_on:
            return
        worth = worth_keeping(self._write, self._table.hits[rows])
        if worth.any() and (worth & self._expiry.admits(rows)).any():
            self._ahead.take_care()

    def _demote(self, rows: Rows) -> tuple[int, int]:
        table = self._table
        self._tell(rows, windows=False)
        if self._residency.tier is None:
            self._expiry.note_lost(rows)
            return self._residency.remove(rows)
        self._expiry.note_left(rows)
        state = self._candidates.state
        with_window, alone = np.empty((2, len(rows)), dtype=np.int64)
        n_windows, n_alone = loops.evicted(state, rows, with_window, alone)
        alone = alone[:n_alone]
        if n_alone:
            self._note_lost(alone)
        windows = self._residency.drop_device_windows(with_window[:n_windows])
        self._residency.device_pool.release(table.device.take(rows))
        self._counters.unsaved_pages += n_alone
        extra, extra_windows = self._residency.remove(alone)
        # what leads to no window on the host cannot be resumed from there
        nowhere = np.empty(len(rows), dtype=np.int64)
        count, demoted = loops.led_nowhere_of(state, rows, nowhere)
        self._residency.remove(nowhere[:count])
        self._counters.demoted_pages += demoted
        return len(rows) + extra, windows + extra_windows
