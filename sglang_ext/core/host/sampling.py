"""What is still copied ahead of eviction while nobody reads the host."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.table import PageTable

ONE_IN = 8
"""Of the prefixes of single requests, one in so many is still copied."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2**64 / golden ratio: its multiples are spread evenly, whatever the distance of ticks."""


class Sampling:
    """Whether the host has been filled anew without a single read.

    Then what comes is most likely not read either, and copying it takes the place of what was
    copied before. A sample stays on the host for ``ONE_IN`` times as long, so that it finds out
    when prefixes come again, also those that come later than all copies would have lasted
    (bimodal insertion: Qureshi et al., Adaptive Insertion Policies, ISCA 2007).

    Never with storage: a prefix that is not read on this host may be read by others, or a day
    later.

    Attributes:
        lost: pages that the host alone had and has dropped since the last read.

    Args:
        host: copies on the host; None without a host tier.
    """

    def __init__(self, host: SlotColumn | None, attachment: Attachment) -> None:
        self.lost = 0
        self._host = host
        self._attachment = attachment

    @property
    def is_on(self) -> bool:
        """Whether copies ahead of eviction are a sample."""
        if self._host is None or self._attachment.is_there:
            return False
        return self.lost >= max(1, self._host.n_present)

    def note_lost(self, pages: int) -> None:
        """The host has dropped what it alone had."""
        self.lost += pages

    def note_read(self) -> None:
        """Something on the host is read."""
        self.lost = 0


def passed_over(table: PageTable, rows: Rows) -> NDArray[np.bool_]:
    """Which pages are not copied while only a sample is.

    The pages that one request alone has used were last used in one tick: they are in the
    sample together, or none is.
    """
    last = table.used[rows] if table.is_learned else table.last_use(rows)
    spread = last.astype(np.uint64) * _ODD
    return (table.hits[rows] <= 1) & (spread >= np.uint64(2**64 // ONE_IN))
