"""Loops over rows of one column of slots, for ``SlotColumn``.

``counts`` are rows with a copy, and those of them that are locked.
"""

from numba.core.types import boolean, uint64, void

from sglang_ext.core.compiled.arrays import FLAGS, INTS, LONGS, SLOTS
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import ABSENT


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


@compiled(void(FLAGS, INTS, LONGS, LONGS))
def lock(present, locks, counts, rows):
    """See ``SlotColumn.lock``."""
    locked = 0
    for i in range(rows.size):
        row = uint64(rows[i])  # never counted from the end
        locked += present[row] & (locks[row] == 0)
        locks[row] += 1
    counts[1] += locked


@compiled(boolean(FLAGS, INTS, LONGS, LONGS))
def unlock(present, locks, counts, rows):
    """See ``SlotColumn.unlock``. False if a row was not locked."""
    least = unlocked = 0
    for i in range(rows.size):
        row = uint64(rows[i])
        left = locks[row] - 1
        locks[row] = left
        least = min(least, left)
        unlocked += present[row] & (left == 0)
    counts[1] -= unlocked
    return least >= 0
