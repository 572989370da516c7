"""Sliding windows: where a request can resume, and which windows are kept for that."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.loop_sets import COMPILED
from sglang_ext.core.table.geometry import Geometry


def deepest_resume(has_window: NDArray[np.bool_], window_pages: int) -> int:
    """Deepest page boundary j at which the window before j is complete.

    Args:
        has_window: (pages,) bool, whether each page of a prefix has its
            sliding-window KV.
        window_pages: pages of one window; all pages before j if j is smaller.

    Returns:
        j with ``has_window[max(0, j - window_pages):j].all()``; 0 if none.
    """
    return int(COMPILED.windows.deepest_resume(has_window, window_pages))


def complete_windows(has_window: NDArray[np.bool_], window_pages: int) -> NDArray[np.bool_]:
    """Whether the window that ends with each page is complete.

    Args:
        has_window: (pages,) bool, as for ``deepest_resume``.
    """
    complete = np.empty(len(has_window), dtype=np.bool_)
    COMPILED.windows.complete_windows(has_window, window_pages, complete)
    return complete


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
    return max(geometry.window_pages, _apart(geometry, page_bytes, _WINDOW_SHARE))


_DENSE_SHARE = 4
"""In memory that nothing else needs they may take one in so many bytes,"""
_DENSE_TOKENS = 4096
"""and more, where that leaves them further apart than this."""


def dense_pages(geometry: Geometry, page_bytes: Sequence[Sequence[int]], interval: int) -> int:
    """Distance of the windows kept inside a prompt as long as the host has free room, in pages; 0
    where those that are always kept are as close.

    Args:
        page_bytes: as for ``checkpoint_pages``.
        interval: what that gives.
    """
    apart = -(-_DENSE_TOKENS // geometry.page_tokens)
    if len(page_bytes) > 1:
        apart = min(apart, _apart(geometry, page_bytes, _DENSE_SHARE))
    apart = max(geometry.window_pages, apart)
    return apart if apart < interval else 0


NEAR_END = 2048
"""Tokens: nearly all prompts that go on from an earlier one part from it so far before its end."""
APART = 512
"""Tokens: a window near the end of a prompt lies at a multiple of them, wherever the prompt ends,
so prompts that share their beginning have it in common."""


def near_end(geometry: Geometry) -> tuple[int, int]:
    """(``NEAR_END``, ``APART``) in pages, at least one."""
    return max(1, NEAR_END // geometry.page_tokens), max(1, APART // geometry.page_tokens)


_STORED_SHARE = 8
"""In storage, where there is more room and a bound takes the ends of prompts first."""


def stored_pages(geometry: Geometry, page_bytes: Sequence[Sequence[int]], dense: int) -> int:
    """Distance of the windows inside a prompt that storage is given, in pages, as far as the host
    has them; 0 where it keeps no more than always.

    Args:
        page_bytes: as for ``checkpoint_pages``.
        dense: what ``dense_pages`` gives.
    """
    if dense == 0 or len(page_bytes) == 1:
        return 0
    return max(dense, _apart(geometry, page_bytes, _STORED_SHARE))


def window_cost(geometry: Geometry, page_bytes: Sequence[Sequence[int]]) -> int:
    """Pages of full attention that take as many bytes as a window, rounded up; 0 without them.

    Args:
        page_bytes: as for ``checkpoint_pages``.
    """
    return _apart(geometry, page_bytes, 1) if len(page_bytes) > 1 else 0


def _apart(geometry: Geometry, page_bytes: Sequence[Sequence[int]], share: int) -> int:
    """Pages between windows that take one in ``share`` bytes of what the pages take."""
    full, window = (sum(size) for size in page_bytes)
    return -(-share * geometry.window_pages * window // full)


@dataclasses.dataclass(frozen=True, slots=True)
class Recompute:
    """What a request that branches off inside a cached prompt computes again: at most so many
    tokens and a page; 0 for no bound.

    Attributes:
        always: whatever else the host has to keep.
        with_room: as long as the host has free memory.
    """

    always: int
    with_room: int


def promised(geometry: Geometry, interval: int, dense: int) -> Recompute:
    """What is promised with these distances, see ``checkpoint_pages`` and ``dense_pages``."""
    page = geometry.page_tokens
    return Recompute(interval * page, (dense or interval) * page)


def dense_points(kept: NDArray[np.bool_], complete: NDArray[np.bool_], interval: int) -> list[int]:
    """Boundaries of a path with complete windows, so that with those of the windows that are
    kept no two are further apart than ``interval`` pages, as far as possible.

    Args:
        kept: (pages,) bool, the window that ends with this page is kept anyway.
        complete: (pages,) bool, it exists.
    """
    found, last = [], 0
    for point in [*(np.flatnonzero(kept) + 1).tolist(), len(kept)]:
        while point - last > interval:
            following = COMPILED.windows.next_complete(complete, last, interval)
            if following >= point:
                break
            found.append(following)
            last = following
        last = point
    return found
