"""Who may go, in the order of last use and by class; see ``retention.order.Order``.

A *stamp* is one use of a run of pages of one class. Stamps count up, so their order is that of
last use. Pages of one stamp are on one path, so no more than one of them can be a leaf: a stamp
has a page that may go, or none. For each class one bit a stamp says which; with two levels of
summaries the next one is found in a few steps wherever it is.
"""

from collections import namedtuple
from typing import Any

import numpy as np
from numba.core.types import Array, NamedTuple, boolean, int16, int32, int64, uint64, void

from sglang_ext.core.compiled.bins import BINS, EDGES, bin_of
from sglang_ext.core.compiled.build import compiled

INTS = Array(int32, 1, "C")
LONGS = Array(int64, 1, "C")
KINDS = Array(int16, 1, "C")
WORDS = Array(uint64, 2, "C")
NONE = -1

FLAGS = Array(boolean, 2, "C")
LANES = Array(int32, 2, "C")
FIELDS = {
    "stamp": INTS,  # (rows,) of the last use, or NONE
    "parent": INTS,  # (rows,) NONE or less for a first page
    "room": INTS,  # (rows,) what a row takes
    "tick": LONGS,  # (stamps,)
    "kind": KINDS,  # (stamps,) class
    "counts": LONGS,  # stamps given so far
    "here": FLAGS,  # (lanes, rows)
    "holders": LANES,  # (lanes, rows) children that are here, and locks
    "leaf": LANES,  # (lanes, stamps) the row that may go, or NONE
    # whether a stamp has a leaf, one bit a stamp: for each lane first for each class, then of any
    "bits": WORDS,  # (lanes * (classes + 1), stamps / 64)
    "words": WORDS,  # the same of words of bits
    "blocks": WORDS,  # and of words of words
}
_Arrays = namedtuple("OrderArrays", FIELDS)
OrderArrays: Any = _Arrays
ORDER = NamedTuple(tuple(FIELDS.values()), _Arrays)

_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ZERO = np.uint64(0)


@compiled(int64(uint64))
def lowest(word):
    """Number of the lowest bit that is set."""
    at = 0
    for width in (32, 16, 8, 4, 2, 1):
        if word & ((_ONE << np.uint64(width)) - _ONE) == _ZERO:
            word >>= np.uint64(width)
            at += width
    return at


@compiled(void(ORDER, int64, int64))
def _raise(order, at, stamp):
    """A stamp has a leaf."""
    order.bits[at, stamp >> 6] |= _ONE << np.uint64(stamp & 63)
    order.words[at, stamp >> 12] |= _ONE << np.uint64((stamp >> 6) & 63)
    order.blocks[at, stamp >> 18] |= _ONE << np.uint64((stamp >> 12) & 63)


@compiled(void(ORDER, int64, int64))
def _clear(order, at, stamp):
    """It has none."""
    order.bits[at, stamp >> 6] &= ~(_ONE << np.uint64(stamp & 63))
    if order.bits[at, stamp >> 6]:
        return
    order.words[at, stamp >> 12] &= ~(_ONE << np.uint64((stamp >> 6) & 63))
    if order.words[at, stamp >> 12]:
        return
    order.blocks[at, stamp >> 18] &= ~(_ONE << np.uint64((stamp >> 12) & 63))


@compiled(int64(ORDER, int64, int64, int64))
def next_leaf(order, kinds, first, end):
    """The first stamp in ``[first, end)`` that has a leaf, by a list of a lane; NONE if none."""
    if first >= end:
        return NONE
    at = first >> 6
    word = order.bits[kinds, at] & (_ALL << np.uint64(first & 63))
    if not word:
        above = (at + 1) >> 6
        upper = _ZERO
        if above < order.words.shape[1]:
            upper = order.words[kinds, above] & (_ALL << np.uint64((at + 1) & 63))
        if not upper:
            top = (above + 1) >> 6
            mask = _ALL << np.uint64((above + 1) & 63)
            while top < order.blocks.shape[1] and not order.blocks[kinds, top] & mask:
                if top << 18 >= end:
                    return NONE
                top += 1
                mask = _ALL
            if top >= order.blocks.shape[1]:
                return NONE
            above = (top << 6) + lowest(order.blocks[kinds, top] & mask)
            upper = order.words[kinds, above]
        at = (above << 6) + lowest(upper)
        word = order.bits[kinds, at]
    stamp = (at << 6) + lowest(word)
    return stamp if stamp < end else NONE


@compiled(int64(ORDER))
def kinds_of(order):
    """Lists of a lane: one for each class, and one for all of them."""
    return order.bits.shape[0] // order.here.shape[0]


@compiled(void(ORDER, int64, int64))
def link(order, lane, row):
    """A row may go, if it is here and nobody holds it."""
    if not order.here[lane, row] or order.holders[lane, row] > 0:
        return
    stamp = order.stamp[row]
    order.leaf[lane, stamp] = row
    first = lane * kinds_of(order)
    _raise(order, first + order.kind[stamp], stamp)
    _raise(order, first + kinds_of(order) - 1, stamp)


@compiled(void(ORDER, int64, int64))
def unlink(order, lane, row):
    """A row may not go."""
    stamp = order.stamp[row]
    if stamp == NONE or order.leaf[lane, stamp] != row:
        return
    order.leaf[lane, stamp] = NONE
    first = lane * kinds_of(order)
    _clear(order, first + order.kind[stamp], stamp)
    _clear(order, first + kinds_of(order) - 1, stamp)


@compiled(void(ORDER, int64, INTS, int64))
def hold(order, lane, rows, holders):
    """Add holders to rows, or take them away."""
    for i in range(rows.size):
        row = rows[i]
        order.holders[lane, row] += holders
        if holders < 0:
            link(order, lane, row)
        else:
            unlink(order, lane, row)


@compiled(void(ORDER, int64, INTS))
def put(order, lane, rows):
    """Rows that have been used come here, and hold their parents."""
    for i in range(rows.size):
        row = rows[i]
        if order.here[lane, row]:
            continue
        order.here[lane, row] = True
        parent = order.parent[row]
        if parent > NONE:
            unlink(order, lane, parent)
            order.holders[lane, parent] += 1
        link(order, lane, row)


@compiled(void(ORDER, int64, int64))
def remove(order, lane, row):
    """A row leaves, and no longer holds its parent."""
    unlink(order, lane, row)
    order.here[lane, row] = False
    parent = order.parent[row]
    if parent > NONE:
        order.holders[lane, parent] -= 1
        link(order, lane, parent)


@compiled(int64(ORDER, int64, int64))
def _new_stamp(order, kind, tick):
    stamp = order.counts[0]
    order.counts[0] = stamp + 1
    order.leaf[:, stamp] = NONE
    order.tick[stamp] = tick
    order.kind[stamp] = kind
    return stamp


@compiled(void(ORDER))
def compact(order):
    """Number those stamps anew that rows here have, in the same order."""
    used = np.full(order.counts[0], NONE, dtype=np.int32)
    for row in range(order.stamp.size):
        if order.here[:, row].any():
            used[order.stamp[row]] = 0
        else:
            order.stamp[row] = NONE
    order.bits[:] = 0
    order.words[:] = 0
    order.blocks[:] = 0
    count = 0
    for stamp in range(used.size):
        if used[stamp] != NONE:
            used[stamp] = count
            order.leaf[:, count] = NONE
            order.tick[count] = order.tick[stamp]
            order.kind[count] = order.kind[stamp]
            count += 1
    order.counts[0] = count
    for row in range(order.stamp.size):
        if order.stamp[row] != NONE:
            order.stamp[row] = used[order.stamp[row]]
            for lane in range(order.here.shape[0]):
                link(order, lane, row)


@compiled(void(ORDER, INTS, KINDS, int64))
def use(order, path, kinds, tick):
    """A request has used the rows of a path, first page first."""
    if order.counts[0] + path.size > order.tick.size:
        compact(order)
    last, stamp = NONE, NONE
    # the end of a path goes before its beginning: it has the smaller stamp
    for i in range(path.size - 1, -1, -1):
        row = path[i]
        for lane in range(order.here.shape[0]):
            unlink(order, lane, row)
        if kinds[i] != last or stamp == NONE:
            last = kinds[i]
            stamp = _new_stamp(order, last, tick)
        order.stamp[row] = stamp
        for lane in range(order.here.shape[0]):
            link(order, lane, row)


@compiled(int64(ORDER, int64, int64, INTS))
def oldest(order, lane, room, out):
    """Remove the least recently used rows until they had ``room``; how many went to ``out``."""
    every = (lane + 1) * kinds_of(order) - 1
    stamp, found = 0, 0
    while room > 0 and found < out.size:
        stamp = next_leaf(order, every, stamp, order.counts[0])
        if stamp == NONE:
            break
        row = order.leaf[lane, stamp]
        parent = order.parent[row]
        remove(order, lane, row)
        out[found] = row
        found += 1
        room -= order.room[row]
        if parent > NONE and order.here[lane, parent]:
            stamp = min(stamp, order.stamp[parent])
    return found


@compiled(LONGS(ORDER, int64))
def _ends(order, now):
    """Of bin b are the stamps ``[ends[b + 1], ends[b])``."""
    ends = np.empty(BINS + 1, dtype=np.int64)
    ends[0] = order.counts[0]
    for b in range(1, BINS):
        low, high = 0, ends[b - 1]
        while low < high:
            middle = (low + high) >> 1
            if now - order.tick[middle] >= EDGES[b]:
                low = middle + 1
            else:
                high = middle
        ends[b] = low
    ends[BINS] = 0
    return ends


@compiled(Array(uint64, 1, "C")(ORDER, int64, INTS, LONGS))
def _cells_with_leaves(order, lane, ranks, ends):
    """One bit a cell, in the order of ranks: whether it has a leaf, for sure if it has one."""
    cells = np.zeros((ranks.size >> 6) + 1, dtype=np.uint64)
    first = lane * kinds_of(order)
    for kind in range(kinds_of(order) - 1):
        stamp = next_leaf(order, first + kind, 0, order.counts[0])
        b = BINS - 1
        while stamp != NONE:
            while stamp >= ends[b]:
                b -= 1
            rank = ranks[kind * BINS + b]
            cells[rank >> 6] |= _ONE << np.uint64(rank & 63)
            stamp = next_leaf(order, first + kind, ends[b], order.counts[0])
    return cells


@compiled(int64(Array(uint64, 1, "C")))
def _first(cells):
    """The first bit that is set, or NONE."""
    for at in range(cells.size):
        if cells[at]:
            return (at << 6) + lowest(cells[at])
    return NONE


@compiled(int64(ORDER, int64, int64, INTS, INTS, int64, INTS))
def cheapest(order, lane, room, cells, ranks, now, out):
    """The same for rows in the order of their cells, each the pages of a class and an age; of one
    cell the least recently used go first.

    Args:
        cells: all cells (class * BINS + bin), first those to go first.
        ranks: where a cell is in ``cells``.
    """
    ends = _ends(order, now)
    first = lane * kinds_of(order)
    left = _cells_with_leaves(order, lane, ranks, ends)
    found = 0
    while room > 0 and found < out.size:
        at = _first(left)
        if at == NONE:
            break
        kind, b = cells[at] // BINS, cells[at] % BINS
        stamp = next_leaf(order, first + kind, ends[b + 1], ends[b])
        if stamp == NONE:
            left[at >> 6] &= ~(_ONE << np.uint64(at & 63))
            continue
        row = order.leaf[lane, stamp]
        parent = order.parent[row]
        remove(order, lane, row)
        out[found] = row
        found += 1
        room -= order.room[row]
        if parent > NONE and order.here[lane, parent] and order.holders[lane, parent] == 0:
            above = order.stamp[parent]
            cell = order.kind[above] * BINS + bin_of(now - order.tick[above])
            left[ranks[cell] >> 6] |= _ONE << np.uint64(ranks[cell] & 63)
    return found


@compiled(int64(ORDER, int64))
def oldest_leaf(order, lane):
    """The row that ``oldest`` would take first, or NONE."""
    stamp = next_leaf(order, (lane + 1) * kinds_of(order) - 1, 0, order.counts[0])
    return NONE if stamp == NONE else order.leaf[lane, stamp]


@compiled(int64(ORDER, int64, INTS, INTS, int64))
def cheapest_leaf(order, lane, cells, ranks, now):
    """The row that ``cheapest`` would take first, or NONE."""
    ends = _ends(order, now)
    at = _first(_cells_with_leaves(order, lane, ranks, ends))
    if at == NONE:
        return NONE
    kind, b = cells[at] // BINS, cells[at] % BINS
    first = lane * kinds_of(order)
    return order.leaf[lane, next_leaf(order, first + kind, ends[b + 1], ends[b])]
