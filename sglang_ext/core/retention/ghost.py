"""A prefix cache without KV, to see what a rule would find in it."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import ghost as loops
from sglang_ext.core.retention.estimate import Estimate
from sglang_ext.core.retention.order import Order

LONGEST = 512
"""Pages of a path that are looked at: marks of a path of a million pages."""


class Ghost:
    """Pages that a cache of some room would hold.

    Args:
        pages: what there is room for.
    """

    def __init__(self, pages: int) -> None:
        rows = pages + LONGEST
        slots = 1
        while slots < 2 * rows:
            slots *= 2
        self._order = Order(np.full(rows, -1, dtype=np.int32), LONGEST)
        self._arrays = loops.GhostArrays(
            slots=np.full(slots, -1, dtype=np.int32),
            digest=np.zeros(rows, dtype=np.uint64),
            free=np.arange(rows, dtype=np.int32),
            counts=np.array([rows, 0, pages, LONGEST], dtype=np.int64),
        )
        self._gone = np.empty(rows, dtype=np.int32)

    def request(
        self,
        path: tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int16]],
        tick: int,
        estimate: Estimate,
        *,
        learned: bool,
    ) -> int:
        """A request has used a path; pages that it found.

        Args:
            path: digests, pages that each stands for, and classes; all (n,).
            learned: what is worth least goes; else what was used least recently.
        """
        digests, room, kinds = path
        return int(
            loops.request(
                self._arrays,
                self._order.arrays,
                digests,
                room,
                kinds,
                tick,
                estimate.cells,
                estimate.ranks,
                learned,
                self._gone,
            )
        )
