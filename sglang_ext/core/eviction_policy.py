"""Eviction policies: in which order full-attention pages go, as one function each.

Every policy ranks a page by what is known of the requests that used it; pages of one rank
go by recency, deeper ones first. All a page's requests have used the pages before it too,
so none of these numbers is larger than that of the page before: the order is leaf-first
whatever the policy.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import MAX_RANK

Numbers = NDArray[np.int32]
Rank = Callable[["Uses"], NDArray[np.int64]]


@dataclasses.dataclass(frozen=True, slots=True)
class Uses:
    """What is known of the requests that used pages.

    Attributes:
        hits: (n,) how many there were.
        priority: (n,) rank of the largest priority among them, see ``PriorityRanks``.
    """

    hits: Numbers
    priority: Numbers


def lru(uses: Uses) -> NDArray[np.int64]:
    """Least recently used first."""
    return np.zeros(len(uses.hits), dtype=np.int64)


def lfu(uses: Uses) -> NDArray[np.int64]:
    """Used by the fewest requests first."""
    return np.minimum(uses.hits, MAX_RANK).astype(np.int64)


def slru(uses: Uses, protected: int = 2) -> NDArray[np.int64]:
    """Used by fewer than ``protected`` requests first."""
    return (uses.hits >= protected).astype(np.int64)


def priority(uses: Uses) -> NDArray[np.int64]:
    """Of requests of the lowest priority first."""
    return uses.priority.astype(np.int64)


MOST_USES = 256.0
"""More than ``expected_uses`` of any page."""


def expected_uses(forks: Numbers, idle: NDArray[np.int64]) -> NDArray[np.float64]:
    """How soon pages of one rank are used again, as far as the past tells: uses per tick since
    the last one. Only those count by which another prefix came to be: that a conversation had
    many turns does not tell that it goes on.

    Args:
        forks: (n,) see ``PageTable``.
        idle: (n,) ticks since the page was used, at least 0.
    """
    uses: NDArray[np.float64] = np.minimum(1.0 + forks, MOST_USES - 1) / (idle + 1.0)
    return uses


POLICIES: dict[str, Rank] = {"lru": lru, "lfu": lfu, "slru": slru, "priority": priority}
"""By the engine's names."""
