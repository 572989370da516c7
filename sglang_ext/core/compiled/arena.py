"""Pages and extents of a host memory, see ``host.arena``."""

import numpy as np
from numba.core.types import Array, boolean, int8, int64

from sglang_ext.core.compiled.build import compiled

_FLAGS = Array(boolean, 1, "C")
_OWNERS = Array(int8, 1, "C")
_LONGS = Array(int64, 1, "C")


@compiled(int64(_FLAGS, int64, int64, _LONGS, int64))
def take(taken, first, stop, out, count):
    """Take free pages of ``[first, stop)``, and write them behind ``count`` others in ``out``, as
    many as it has room for; how many it has then."""
    for page in range(first, stop):
        if count == out.size:
            break
        if not taken[page]:
            taken[page] = True
            out[count] = page
            count += 1
    return count


@compiled(int64(_OWNERS, _LONGS, _LONGS, _LONGS, _FLAGS, int64, _LONGS))
def take_holes(owner, used, first, stop, taken, component, out):
    """Take free pages in the extents of a component, of the fullest ones first, as many as ``out``
    has room for; how many."""
    count = int64(0)
    while count < out.size:
        fullest = -1
        for extent in range(owner.size):
            if owner[extent] == component and used[extent] < stop[extent] - first[extent]:
                if fullest < 0 or used[extent] > used[fullest]:
                    fullest = extent
        if fullest < 0:
            break
        before = count
        count = take(taken, first[fullest], stop[fullest], out, count)
        used[fullest] += count - before
    return count


@compiled(int64(_LONGS, _LONGS, _FLAGS, _LONGS, _LONGS))
def release(first, used, taken, pages, empty):
    """Give pages back; writes extents without pages to ``empty`` and returns how many these are,
    or -1 if one of the pages is free."""
    count = 0
    for i in range(pages.size):
        page = pages[i]
        if not taken[page]:
            return int64(-1)
        taken[page] = False
        extent = np.searchsorted(first, page, side="right") - 1
        used[extent] -= 1
        if used[extent] == 0:
            empty[count] = extent
            count += 1
    return count
