"""How much an eviction frees, and which windows are worth the least."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

_SPARE_SHARE, _SPARE_SHARE_IF_LOST = 32, 64
"""One eviction frees at most this part of the device beyond what was asked for, less where there is
no host and what goes is lost,"""
_SPARE_TIMES = 63
"""and at most so many times what was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spare:
    """What an eviction may free beyond what was asked for, so that the next ones find the work
    done: most of what an eviction costs does not depend on how much it frees.

    Attributes:
        pages: full-attention pages on the device.
        window_pages: the same for sliding-window copies.
    """

    pages: int = 0
    window_pages: int = 0

    @classmethod
    def for_device(cls, pages: int, window_pages: int, *, has_host: bool) -> "Spare":
        """What a server with so many device pages of each component runs with."""
        share = _SPARE_SHARE if has_host else _SPARE_SHARE_IF_LOST
        return cls(pages // share, window_pages // share)

    def beside(self, pages: int) -> int:
        """Pages beyond ``pages`` asked for."""
        return min(self.pages, _SPARE_TIMES * pages)

    def beside_windows(self, pages: int) -> int:
        """The same for sliding-window copies."""
        return min(self.window_pages, _SPARE_TIMES * pages)


NO_SPARE = Spare()


def cheapest_first(
    saved: NDArray[np.int64], freed: NDArray[np.int64], idle: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Order of windows: the first ones are worth the least.

    What a window is worth is the recompute that it saves for each page it takes, less the
    longer nobody has used it.

    Args:
        saved: (n,) pages computed again if a request would have resumed there.
        freed: (n,) pages that are free without it, at least 1.
        idle: (n,) ticks since it was used, at least 0.
    """
    order: NDArray[np.int64] = np.argsort(saved / (freed * (idle + 1.0)), kind="stable")
    return order
