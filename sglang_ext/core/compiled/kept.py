"""Kept windows of a path, see ``host.kept``."""

from numba.core.types import Array, UniTuple, boolean, int32, int64, void

from sglang_ext.core.compiled.build import compiled

_FLAGS = Array(boolean, 1, "C")
_INTS = Array(int32, 1, "C")
_LONGS = Array(int64, 1, "C")


@compiled(int64(_FLAGS, _INTS, _INTS, _LONGS, int64, _LONGS))
def add(ends, uses, below, path, window, changed):
    """See ``KeptWindows.add``; writes to ``changed`` pages of which that says something, and
    returns how many."""
    count, last = int64(0), path.size - 1
    ends[path[last]] = True
    for i in range(max(0, path.size - window), path.size):
        uses[path[i]] += 1
    for i in range(path.size):
        row = path[i]
        below[row] += 1
        # whether there are none, one or more says something of an end, of others whether any
        if below[row] == 1 or (below[row] == 2 and ends[row]) or i == last:
            changed[count] = row
            count += 1
    return count


@compiled(UniTuple(int64, 2)(_INTS, _FLAGS, _INTS, _INTS, int64, int64, _LONGS, _LONGS))
def remove(parent, ends, uses, below, end, window, changed, unneeded):
    """See ``KeptWindows.remove``; writes to ``changed`` as ``add`` does, and to ``unneeded`` the
    pages of the window that no other kept one needs, the last one first; how many each."""
    count, free, place, row = int64(0), int64(0), int64(0), end
    ends[end] = False
    while row >= 0:
        below[row] -= 1
        if below[row] == 0 or (below[row] == 1 and ends[row]) or place == 0:
            changed[count] = row
            count += 1
        if place < window:
            uses[row] -= 1
            if uses[row] == 0:
                unneeded[free] = row
                free += 1
        place += 1
        row = int64(parent[row])
    return count, free


@compiled(void(_INTS, _LONGS, Array(int64, 2, "C")))
def windows(parent, ends, out):
    """See ``KeptWindows.windows``; writes to all of ``out``."""
    for i in range(ends.size):
        row = ends[i]
        for k in range(out.shape[1]):
            out[i, k] = row
            row = int64(max(parent[row], -1)) if row >= 0 else int64(-1)
