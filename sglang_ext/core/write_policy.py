"""Write policies: which pages go to the host when, as functions of the table's state."""

import enum

import numpy as np
from numpy.typing import NDArray

_SELECTIVE_HITS = 2


class WritePolicy(enum.Enum):
    """The engine's names. Whatever is worth it is also copied ahead of its eviction."""

    WRITE_THROUGH = "write_through"
    """Copy a page as soon as it is in the table."""
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    """Copy a page as soon as a second request has used it; drop the others."""
    WRITE_BACK = "write_back"
    """Copy a page when its eviction is near."""


def pages_to_copy_now(policy: WritePolicy, hits: NDArray[np.int32]) -> int:
    """Pages of a path, from its root on, to back up when a request has extended it.

    Args:
        hits: (pages,) int32, requests that have used each page of the path; never
            larger than that of the page before.
    """
    if policy is WritePolicy.WRITE_BACK:
        return 0
    if policy is WritePolicy.WRITE_THROUGH:
        return len(hits)
    return int(np.count_nonzero(worth_keeping(policy, hits)))


def worth_keeping(policy: WritePolicy, hits: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which pages are copied to the host before the device evicts them."""
    needed = _SELECTIVE_HITS if policy is WritePolicy.WRITE_THROUGH_SELECTIVE else 0
    return hits >= needed
