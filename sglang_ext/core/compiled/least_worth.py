"""What pages are worth, and who of those that expire first is worth least; see
``retention.expiry``."""

import numpy as np
from numba.core.types import Array, UniTuple, int8, int32, int64, void

from sglang_ext.core.compiled.bins import BINS, bin_of
from sglang_ext.core.compiled.build import compiled

_INTS = Array(int32, 1, "C")
_LONGS = Array(int64, 1, "C")
_BYTES = Array(int8, 1, "C")
_VALUES = Array(int64, 2, "C")


@compiled(void(_LONGS, _BYTES, _LONGS, int64, _LONGS))
def cells_of(rows, kind, used, tick, out):
    """Cells of the pages in the tables of an ``Estimate``: ``class * BINS + bin``."""
    for i in range(rows.size):
        row = rows[i]
        out[i] = kind[row] * BINS + bin_of(tick - used[row])


@compiled(UniTuple(int64, 2)(_LONGS, _BYTES, _LONGS, int64, _VALUES))
def worth_of_known(rows, kind, used, tick, values):
    """(what the pages of a class are worth together, how many they are); those of class 0 are of
    none."""
    worth, count = int64(0), int64(0)
    for i in range(rows.size):
        row = rows[i]
        if kind[row] > 0:
            worth += values[kind[row], bin_of(tick - used[row])]
            count += 1
    return worth, count


@compiled(void(_LONGS, _INTS, _BYTES, _LONGS, int64, _INTS, _INTS, _LONGS))
def least_worth(rows, parent, kind, used, tick, ranks, most, out):
    """Write those of ``rows`` to ``out`` that are worth least, in that order. A page is worth no
    less than what is below it.

    Args:
        rows: each before the row above it, if that is there.
        parent, kind, used: of the table.
        tick: in which ``used`` counts.
        ranks: see ``Estimate``.
        most: (rows of the table,) scratch, 0 everywhere before and after.
        out: no more than there are.
    """
    first = np.zeros(ranks.size + 2, dtype=np.int64)
    for i in range(rows.size):
        row = rows[i]
        most[row] = max(most[row], ranks[kind[row] * BINS + bin_of(tick - used[row])] + 1)
        if parent[row] >= 0:
            most[parent[row]] = max(most[parent[row]], most[row])
        first[most[row] + 1] += 1
    for rank in range(1, first.size):
        first[rank] += first[rank - 1]
    for i in range(rows.size):
        row = rows[i]
        place = first[most[row]]
        first[most[row]] += 1
        if place < out.size:
            out[place] = row
    for i in range(rows.size):
        row = rows[i]
        most[row] = 0
        if parent[row] >= 0:
            most[parent[row]] = 0
