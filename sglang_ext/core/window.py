"""Sliding windows: where a request can resume, and which windows are kept for that."""

from collections.abc import Sequence

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
    ends = np.flatnonzero(complete_windows(has_window, window_pages))
    return int(ends[-1]) + 1 if len(ends) else 0


_WINDOW_SHARE = 32
"""Windows inside a prompt take at most one in so many bytes of what its pages take."""
_WINDOWS_ALONE = 8
"""The same where a prompt has nothing but sliding-window KV: of what all of that would take."""


def checkpoint_pages(
    geometry: Geometry, page_bytes: Sequence[Sequence[int]], tokens: int | None
) -> int:
    """Distance of the windows kept inside a prompt, in pages.

    Args:
        page_bytes: of a full-attention page, if the model has such layers, and of a
            sliding-window page, in each plane.
        tokens: the distance asked for, 0 for none inside. None derives it from the model: as
            close as a fixed part of what the pages between them take allows, and not closer
            than a window.
    """
    if tokens is not None:
        return -(-tokens // geometry.page_tokens)
    if len(page_bytes) == 1:
        return _WINDOWS_ALONE * geometry.window_pages
    full, window = (sum(size) for size in page_bytes)
    window_bytes = geometry.window_pages * window
    return max(geometry.window_pages, -(-_WINDOW_SHARE * window_bytes // full))


def complete_windows(has_window: NDArray[np.bool_], window_pages: int) -> NDArray[np.bool_]:
    """Whether the window that ends with each page is complete.

    Args:
        has_window: (pages,) bool, as for ``deepest_resume``.
    """
    position = np.arange(len(has_window))
    last_missing = np.maximum.accumulate(np.where(has_window, -1, position))
    complete: NDArray[np.bool_] = (position - last_missing >= window_pages) | (last_missing < 0)
    return complete


def resume_points(
    marked: NDArray[np.bool_],
    branches: NDArray[np.bool_],
    complete: NDArray[np.bool_],
    interval: int,
) -> NDArray[np.bool_]:
    """Pages of a path whose windows are worth keeping.

    Those are its end, where the conversation goes on; pages after which prefixes diverge;
    and as many of the others that no two are further apart than ``interval`` pages: who
    branches off anywhere then computes at most that much again. Further apart are only
    those between which no window is complete.

    Args:
        marked: (pages,) bool, what was worth keeping before the path grew.
        branches: (pages,) bool, prefixes diverge after this page.
        complete: (pages,) bool, the window that ends with this page exists.
        interval: 0 for no bound.
    """
    keep = branches & complete
    if len(keep) == 0:
        return keep
    # boundaries, that is pages before the resume point; the last one is the end
    points = (np.flatnonzero(marked & complete) + 1).tolist()
    if not points or points[-1] < len(keep):
        points.append(len(keep))
    available = np.flatnonzero(complete) + 1
    last = 0
    for number, point in enumerate(points):
        if interval:
            while point - last > interval and (j := _next(available, last, interval)) < point:
                keep[j - 1] = True
                last = j
        following = points[number + 1] if number + 1 < len(points) else None
        needed = following is None or (interval and following - last > interval)
        if complete[point - 1] and (needed or keep[point - 1]):
            keep[point - 1] = True
            last = point
    return keep


def _next(available: NDArray[np.int64], last: int, interval: int) -> int:
    """The boundary up to ``interval`` after ``last`` that is furthest away, or else the
    first one beyond."""
    n = int(np.searchsorted(available, last + interval, side="right"))
    if n and available[n - 1] > last:
        return int(available[n - 1])
    return int(available[n]) if n < len(available) else 1 << 62
