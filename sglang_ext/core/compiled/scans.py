"""Loops over whole columns and other arrays: what eviction takes next, what is to be copied before
that, and what is to be cleared."""

import numpy as np
from numba.core.types import Array, Tuple, boolean, int16, int32, int64, void
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled

FLAGS = Array(boolean, 1, "C")
INTS = Array(int32, 1, "C")
LONGS = Array(int64, 1, "C")

# ---- victims: see ``VictimQueue`` ---------------------------------------------------


@compiled(Tuple((int64, int64))(LONGS, LONGS, int64, LONGS, FLAGS, INTS, LONGS))
def next_victims(rows, ages, first, age, present, locks, out):
    """Up to ``out.size`` rows from ``rows[first:]`` that are still victims and of the age that
    they had; how many they are, and where the first one is."""
    count, start = 0, rows.size
    for i in range(first, rows.size):
        if count == out.size:
            break
        row = rows[i]
        if present[row] and locks[row] == 0 and age[row] == ages[i]:
            if count == 0:
                start = i
            out[count] = row
            count += 1
    return count, start


@compiled(Tuple((int64, int64))(LONGS, LONGS, LONGS, LONGS, FLAGS, INTS, int64, FLAGS, LONGS))
def merge_victims(rows, ages, offered, age, present, locks, horizon, mark, out):
    """Of ``rows`` those still of the age that they had, and of ``offered`` the victims up to an
    age, each once; how many there are, and how many of them are new. ``mark`` is False
    everywhere, and again afterwards."""
    kept = 0
    for i in range(rows.size):
        row = rows[i]
        if age[row] == ages[i]:
            out[kept] = row
            mark[row] = True
            kept += 1
    count = kept
    for i in range(offered.size):
        row = offered[i]
        if not mark[row] and present[row] and locks[row] == 0 and age[row] <= horizon:
            out[count] = row
            mark[row] = True
            count += 1
    for i in range(count):
        mark[out[i]] = False
    return count, count - kept


@compiled(int64(LONGS, FLAGS, INTS, int64, LONGS))
def sample_victims(age, present, locks, step, out):
    """Ages of the victims among every ``step``-th row; how many they are."""
    count = 0
    for row in range(0, age.size, step):
        if present[row] and locks[row] == 0:
            out[count] = age[row]
            count += 1
    return count


@compiled(int64(LONGS, FLAGS, INTS, int64, LONGS))
def victims_up_to(age, present, locks, horizon, out):
    """Victims up to an age; how many they are."""
    count = 0
    for row in range(age.size):
        if age[row] <= horizon and present[row] and locks[row] == 0:
            if count == out.size:
                break  # more than are counted: the caller finds out
            out[count] = row
            count += 1
    return count


# ---- copies ahead of eviction: see ``Demotion`` -------------------------------------


@compiled(void(INTS, FLAGS, FLAGS, FLAGS, FLAGS, FLAGS, int64, LONGS, FLAGS))
def windows_to_save(parent, worth, kept, swa_ready, swa_present, host_present, size, end_of, lost):
    """See ``Demotion.windows_to_save``; writes to ``end_of``, which is -1 everywhere, and to
    ``lost``, which is False everywhere."""
    ends = np.empty(parent.size, dtype=np.int64)
    count = 0
    for end in range(parent.size):
        if worth[end] and not kept[end]:
            row, whole = end, True
            for _ in range(size):
                whole &= swa_ready[row] or host_present[row]
                row = parent[row]
                if row < 0 or not whole:
                    break
            if whole:
                ends[count] = end
                count += 1
    # where windows share a page, it goes with the one that ends furthest below it
    rows = ends[:count].copy()
    for _ in range(size):
        for i in range(count):
            row = rows[i]
            if row >= 0:
                end_of[row] = ends[i]
                lost[row] = swa_present[row] and not host_present[row]
                rows[i] = parent[row]


@compiled(Tuple((int64, int64))(FLAGS, INTS, FLAGS, FLAGS, Array(int16, 1, "C"), int64, LONGS))
def evictable(present, locks, host_present, host_ready, holds, each, out):
    """See ``Demotion.evictable``; (rows written to ``out``, pages that are being copied). What
    backups hold is ``each``, or if that is negative, ``holds``."""
    count = copying = 0
    for row in range(present.size):
        if not present[row]:
            continue
        if locks[row] == 0:
            if count < out.size:
                out[count] = row
            count += 1
        held = each if each >= 0 else holds[row]
        copying += host_present[row] and not host_ready[row] and locks[row] == held
    return count, copying


# ---- other arrays -------------------------------------------------------------------


@compiled(void(Array(int64, 2, "C"), INTS))
def clear_rows(array: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Set rows of an array to 0."""
    for i in range(rows.size):
        array[rows[i], :] = 0
