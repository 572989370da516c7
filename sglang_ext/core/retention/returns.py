"""When pages are used again, as the requests of the last while tell."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import returns as loops
from sglang_ext.core.compiled.bins import BINS
from sglang_ext.core.retention.estimate import Estimate
from sglang_ext.core.table.columns import resident_zeros

Digests = NDArray[np.uint64]
Kinds = NDArray[np.int16]
MOST_ENTRIES = 1 << 20
"""Pages remembered: 24 bytes each."""
MOST_USES = 1 << 15
"""Uses remembered: 34 bytes each. A request has one, and one more for each class on its path."""


class Returns:
    """A history of paths, those included whose KV is long gone.

    A use of a page waits for the next one; its class is that of the last request whose path used
    it. For each class and age two numbers are kept: how many pages were used again at that age,
    and how many ticks pages were of that age and could have been. What has not come back counts
    in the latter, and so does what has been forgotten, as long as it was remembered. Both fade:
    each ``rebuild`` forgets one part in 32.

    A tick is a request; they count up. Not all pages are remembered but marks: all of the first
    64, then 32 for each doubling of the depth, each for the pages before it.

    Args:
        pages: of the cache; several times as many are remembered, up to MOST_ENTRIES.
    """

    def __init__(self, pages: int) -> None:
        entries = loops.WAYS
        while entries < min(8 * pages, MOST_ENTRIES):
            entries *= 2
        uses = min(MOST_USES, max(1 << 12, entries))
        table = (loops.CLASSES, BINS)
        # hashes lead everywhere: the first request would wait for all of the memory
        self._arrays = loops.ReturnsArrays(
            digest=resident_zeros(entries, np.uint64),
            use=np.full(entries, loops.NO_USE, dtype=np.int64),
            forks=resident_zeros(entries, np.int32),
            weight=resident_zeros(entries, np.int32),
            tick=resident_zeros(uses, np.int64),
            kind=resident_zeros(uses, np.int16),
            pending=resident_zeros(uses, np.int64),
            turn=resident_zeros(uses, np.int32),
            pages=resident_zeros(uses, np.int32),
            counts=np.zeros(4, dtype=np.int64),
            events=np.zeros(table, dtype=np.int64),
            exposure=np.zeros(table, dtype=np.int64),
            depths=np.zeros((loops.CLASSES, 2), dtype=np.int64),
        )

    @property
    def events(self) -> NDArray[np.int64]:
        """(classes, bins) pages used again at an age, in 1/256 pages. Read-only."""
        events: NDArray[np.int64] = self._arrays.events
        return events

    @property
    def exposure(self) -> NDArray[np.int64]:
        """(classes, bins) ticks at that age, in 1/256 pages. Read-only."""
        exposure: NDArray[np.int64] = self._arrays.exposure
        return exposure

    @property
    def ends(self) -> tuple[int, int]:
        """Prompts of late that went on from the end of an earlier one or from near it, and those
        of them from near it; in 1/256."""
        return int(self._arrays.counts[loops.ENDS]), int(self._arrays.counts[loops.ENDS_NEAR])

    def observe(self, digests: Digests, prompt: int, tick: int, apart: int = 1) -> Kinds:
        """A request has used a path.

        Args:
            digests: (n,) of its whole pages, first page first, each for the whole prefix.
            prompt: pages of them that it has asked for, at least 1; the others are its answer.
            tick: not before that of the last call.
            apart: pages; what is behind the last multiple of them in a prompt is near its end.

        Returns:
            (n,) int16, the classes of the pages from now on. They do not change along a path more
            often than there are classes.

        Cost: O(marks): 120 for a path of 200 pages, 224 for one of 2,000.
        """
        kinds = np.empty(len(digests), dtype=np.int16)
        loops.observe(self._arrays, digests, prompt, tick, apart, kinds)
        return kinds

    def estimate(self, tick: int, depth_cost: int = 0) -> Estimate:
        """What the history says at a tick; it forgets a little. See Estimate.

        Cost: bounded, O(uses remembered + classes * bins * bins).
        """
        arrays = self._arrays
        loops.advance(arrays, tick)
        chances = np.empty(arrays.events.shape, dtype=np.int64)
        loops.chances(arrays.events, arrays.exposure, loops.PRIOR, chances)
        depths = arrays.depths[:, 1] // np.maximum(1, arrays.depths[:, 0])
        return Estimate.of(chances, depths, depth_cost)
