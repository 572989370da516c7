"""Which pages have left, and how long after their last use: for metrics."""

import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from sglang_ext.adapter.metric_definitions import Cause
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.table.columns import Rows

_MOST_AGES = 256
"""Evictions that are kept for the next look."""
_MOST_REMEMBERED = 1 << 20
"""Pages that have gone and are remembered: 9 bytes each."""
_PER_ROW = 4
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_CAUSES = (Cause.NEW, Cause.EVICTED, Cause.NOT_COPIED)
_EVICTED, _NOT_COPIED = 1, 2


class DeparturesSeen:
    """Departures (see ``core.ports``), with a clock and a memory.

    The memory is a table without chains: a page that goes later takes the place of another one now
    and then, which counts as new again.
    """

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        capacity = index.table.capacity
        bits = (min(_PER_ROW * capacity, _MOST_REMEMBERED) - 1).bit_length()
        size, self._shift = 1 << bits, np.uint64(64 - bits)
        self._digest: NDArray[np.uint64] = np.zeros(size, dtype=np.uint64)
        self._cause: NDArray[np.int8] = np.zeros(size, dtype=np.int8)
        self._used = np.zeros(capacity)
        self._ages: deque[tuple[str, str, float]] = deque(maxlen=_MOST_AGES)

    def used(self, rows: Rows) -> None:
        """A request uses a path now."""
        self._used[rows] = time.monotonic()

    def left_device(self, rows: Rows, *, windows: bool) -> None:
        """See Departures."""
        self._note_age("swa" if windows else "full", "device", rows)

    def forgotten(self, rows: Rows, on_host: NDArray[np.bool_]) -> None:
        """See Departures."""
        digest = self._index.table.digest[rows]
        place = self._place(digest)
        self._digest[place] = digest
        has_host = self._index.host_tier is not None
        self._cause[place] = np.where(on_host | (not has_host), _EVICTED, _NOT_COPIED)
        self._note_age("full", "host", rows[on_host])
        self._used[rows] = 0.0

    def _note_age(self, component: str, tier: str, rows: Rows) -> None:
        used = self._used[rows]
        used = used[used > 0.0]  # what storage brought may go before anybody uses it
        if len(used):
            self._ages.append((component, tier, time.monotonic() - float(used.mean())))

    def come_back(self, rows: Rows) -> dict[Cause, int]:
        """Pages that had to be computed, by whether they had been there before; they are again."""
        digest = self._index.table.digest[rows]
        place = self._place(digest)
        known = np.where(self._digest[place] == digest, self._cause[place], 0)
        self._cause[place[known > 0]] = 0
        return dict(zip(_CAUSES, np.bincount(known, minlength=3).tolist(), strict=True))

    def _place(self, digest: NDArray[np.uint64]) -> NDArray[np.uint64]:
        # low bits of a digest are those of few tokens
        place: NDArray[np.uint64] = (digest * _SPREAD) >> self._shift
        return place

    def take_ages(self) -> list[tuple[str, str, float]]:
        """(component, tier, seconds) of evictions since the last call."""
        return [self._ages.popleft() for _ in range(len(self._ages))]

    def clear(self) -> None:
        """What was there is of no use to anybody any more: it was not evicted."""
        self._cause[:] = 0
