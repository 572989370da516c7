"""Eviction policies: in which order full-attention pages go.

Every policy ranks a page by what is known of the requests that used it, see ``loops.rank_of``;
pages of one rank go by recency, deeper ones first. All a page's requests have used the pages before
it too, so none of these numbers is larger than that of the page before: the order is leaf-first
whatever the policy.
"""

import enum

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import constants

Numbers = NDArray[np.int32]


class EvictionPolicy(enum.IntEnum):
    """What goes first. The numbers are compiled in."""

    LRU = constants.LRU
    """Least recently used."""
    LFU = constants.LFU
    """Used by the fewest requests."""
    SLRU = constants.SLRU
    """Used by one request."""
    PRIORITY = constants.PRIORITY
    """Of requests of the lowest priority."""
    LEARNED = constants.LEARNED
    """What is not expected back, see ``retention.expiry``."""
    TLRU = constants.TLRU
    """What is behind all that a prefix needs, so that the next prompt that goes on from it has
    no more to compute than it may: tail-optimized, arXiv:2510.15152."""
    SESSIONS = constants.SESSIONS
    """What no open session has used, see ``sessions``."""


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


EVERY = {policy.name.lower(): policy for policy in EvictionPolicy}
_BY_ANOTHER_OPTION = (EvictionPolicy.LEARNED, EvictionPolicy.SESSIONS)
POLICIES = {name: policy for name, policy in EVERY.items() if policy not in _BY_ANOTHER_OPTION}
"""Those that the engine has names for."""
