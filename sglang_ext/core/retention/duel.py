"""Which rule decides: the one that has found more of late."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.marks import sampled
from sglang_ext.core.retention.estimate import Estimate
from sglang_ext.core.retention.ghost import Ghost

_SAMPLE = 1024
"""Pages of a ghost, at most."""
_EDGE = 64
"""The learned rule takes over when it finds more by one part in so many."""
_FADE = 8
"""Each time one part in so many is forgotten of what was found."""


class Duel:
    """Two ghosts of one tier, over the same sample of pages: one drops what was used least
    recently, the other what is worth least.

    Args:
        pages: of the tier.
    """

    def __init__(self, pages: int) -> None:
        self._rate_bits = 0
        while pages >> self._rate_bits > _SAMPLE:
            self._rate_bits += 1
        room = max(1, pages >> self._rate_bits)
        self._lru, self._learned = Ghost(room), Ghost(room)
        self._found_lru = self._found_learned = 0
        self._requests = 0
        self.learned = False

    @property
    def found(self) -> tuple[int, int]:
        """(least recently used, learned): pages that the ghosts found of late, in 1/256."""
        return self._found_lru, self._found_learned

    def request(
        self, digests: NDArray[np.uint64], kinds: NDArray[np.int16], tick: int, estimate: Estimate
    ) -> None:
        """A request has used a path."""
        depths, pages = sampled(digests, self._rate_bits)
        path = digests[depths], pages, kinds[depths]
        self._found_lru += self._lru.request(path, tick, estimate, learned=False) << 8
        self._found_learned += self._learned.request(path, tick, estimate, learned=True) << 8

    def settle(self) -> None:
        """Say who decides from now on; what was found before fades."""
        lru, learned = self._found_lru, self._found_learned
        if self.learned:
            self.learned = learned >= lru
        else:
            self.learned = learned > lru + lru // _EDGE
        self._found_lru -= lru // _FADE
        self._found_learned -= learned // _FADE
