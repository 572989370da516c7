"""Loops over rows of one column of slots, for ``SlotColumn``.

``counts`` are rows with a copy, and those of them that are locked.
"""

from numba.core.types import boolean, int32, int64, uint64, void

from sglang_ext.core.compiled.arrays import FLAGS, INTS, LONGS, SLOTS
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import ABSENT

_AT_ONCE = 256
"""So many rows are looked at together."""


@compiled(void(FLAGS, FLAGS, INTS, SLOTS, LONGS, LONGS, SLOTS, boolean))
def put(present, ready, locks, slots, counts, rows, new, is_ready):
    """See ``SlotColumn.put``; rows whose slots are absent are left out."""
    added = locked = 0
    for i in range(rows.size):
        if new[i, 0] == ABSENT:
            continue
        row = rows[i]
        for k in range(new.shape[1]):
            slots[row, k] = new[i, k]
        present[row] = True
        ready[row] = is_ready
        added += 1
        locked += locks[row] > 0
    counts[0] += added
    counts[1] += locked


@compiled(void(FLAGS, FLAGS, INTS, SLOTS, LONGS, LONGS, SLOTS))
def take(present, ready, locks, slots, counts, rows, out):
    """See ``SlotColumn.take``."""
    locked = 0
    for i in range(rows.size):
        row = rows[i]
        for k in range(out.shape[1]):
            out[i, k] = slots[row, k]
            slots[row, k] = ABSENT
        present[row] = False
        ready[row] = False
        locked += locks[row] > 0
    counts[0] -= rows.size
    counts[1] -= locked


@compiled(boolean(LONGS, int64, int64), inline=True)
def _follow_one_another(rows, begin, end):
    """Whether some of the rows do, as those of a long prompt: a sweep over them takes a quarter of
    the time."""
    first = uint64(rows[uint64(begin)])
    differs = uint64(rows[uint64(end - 1)]) ^ (first + uint64(end - 1 - begin))
    if differs == uint64(0):
        for i in range(begin, end):
            differs |= uint64(rows[uint64(i)]) ^ (first + uint64(i - begin))
    return differs == uint64(0)


@compiled(int64(FLAGS, INTS, LONGS, LONGS))
def lock(present, locks, counts, rows):
    """See ``SlotColumn.lock``. How many copies have got their first holder."""
    locked = int64(0)
    for begin in range(0, rows.size, _AT_ONCE):
        end = min(begin + _AT_ONCE, rows.size)
        if _follow_one_another(rows, begin, end):
            first, some = uint64(rows[uint64(begin)]), int32(0)
            for i in range(end - begin):
                row = first + uint64(i)
                held = locks[row]
                some += int32(present[row] & (held == 0))
                locks[row] = held + int32(1)
            locked += some
        else:
            for i in range(begin, end):
                row = uint64(rows[uint64(i)])  # never counted from the end
                locked += present[row] & (locks[row] == 0)
                locks[row] += 1
    counts[1] += locked
    return locked


@compiled(int64(FLAGS, INTS, LONGS, LONGS))
def unlock(present, locks, counts, rows):
    """See ``SlotColumn.unlock``. How many copies have lost their last holder; -1 if a row was not
    locked."""
    least, unlocked = int32(0), int64(0)
    for begin in range(0, rows.size, _AT_ONCE):
        end = min(begin + _AT_ONCE, rows.size)
        if _follow_one_another(rows, begin, end):
            first, some = uint64(rows[uint64(begin)]), int32(0)
            for i in range(end - begin):
                row = first + uint64(i)
                left = int32(locks[row] - int32(1))
                locks[row] = left
                least = min(least, left)
                some += int32(present[row] & (left == 0))
            unlocked += some
        else:
            for i in range(begin, end):
                row = uint64(rows[uint64(i)])
                left = int32(locks[row] - int32(1))
                locks[row] = left
                least = min(least, left)
                unlocked += present[row] & (left == 0)
    counts[1] -= unlocked
    return unlocked if least >= 0 else int64(-1)
