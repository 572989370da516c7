"""Sliding windows: where a request can resume, and which windows are kept for that."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.geometry import Geometry


def deepest_resume(has_window: NDArray[np.bool_], window_pages: int) -> int:
    """Deepest page boundary j at which the window before j is complete.

    Args:
        has_window: (pages,) bool, whether each page of a prefix has its
            sliding-window KV.
        window_pages: pages of one window; all pages before j if j is smaller.

    Returns:
        j with ``has_window[max(0, j - window_pages):j].all()``; 0 if none.
    """
    n = len(has_window)
    if has_window[max(0, n - window_pages) :].all():
        return n
    position = np.arange(n)
    last_missing = np.maximum.accumulate(np.where(has_window, -1, position))
    complete = (position - last_missing >= window_pages) | (last_missing < 0)
    ends = np.flatnonzero(complete)
    return int(ends[-1]) + 1 if len(ends) else 0


_WINDOW_SHARE = 4
"""A window inside a prompt takes at most this part of what the pages up to the next do."""


def checkpoint_pages(geometry: Geometry, page_bytes: Sequence[Sequence[int]]) -> int:
    """Distance of the windows kept inside a prompt: as close as a fixed part of what
    the pages between them take allows, and not closer than a window.

    Args:
        page_bytes: of a full-attention page and of a sliding-window page, in each plane.
    """
    full, window = (sum(size) for size in page_bytes)
    window_bytes = geometry.window_pages * window
    return max(geometry.window_pages, -(-_WINDOW_SHARE * window_bytes // full))


def checkpoint_windows(
    first: int, end: int, interval: int, window_pages: int
) -> Iterator[tuple[int, int]]:
    """Windows worth keeping for a prefix that has just grown from ``first`` to ``end``.

    The window at the end comes first: that is where the conversation goes on. Then,
    deepest first, one at every multiple of ``interval`` pages in between, where
    another request may branch off; recompute after a branch is then bounded.

    Yields:
        Half-open page ranges ``[max(0, j - window_pages), j)``; they may overlap.
    """
    yield max(0, end - window_pages), end
    for boundary in range((end - 1) // interval * interval, first, -interval):
        yield max(0, boundary - window_pages), boundary
