"""Sets of rows in the order of a key each: a row goes in and comes out in O(log n), and the first
ones lie one behind the other.

A set is blocks of rows in order, and a list of its blocks; all sets take their blocks from one
stock. Of equal keys the smallest row comes first, so the order is the same however rows came in.
The rows of a block begin anywhere in it: what comes first goes first, and moves nothing.
"""

from collections import namedtuple

import numpy as np
from numba import carray
from numba.core.types import (
    Array,
    NamedTuple,
    UniTuple,
    boolean,
    int32,
    int64,
    uint16,
    uint64,
    void,
)

from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.memory import pointer

_LONGS = Array(int64, 1, "C")
_INTS = Array(int32, 1, "C")
_TABLE_OF_INTS = Array(int32, 2, "C")
_TABLE_OF_LONGS = Array(int64, 2, "C")
BLOCK = 256
"""Rows of a block."""
_HALF = BLOCK // 2
N_SETS = 9
"""See ``candidates``."""

ORDERED_FIELDS = {
    "members": Array(uint16, 1, "C"),  # (rows,) a bit for each set that a row is in
    "key": _TABLE_OF_LONGS,  # (rows, sets) the keys with which
    "sizes": _LONGS,  # (sets,) rows
    "lengths": _LONGS,  # (sets,) blocks
    "blocks": _TABLE_OF_INTS,  # (sets, ...) those of each set
    "begin": _INTS,  # where the rows of each block begin
    "end": _INTS,  # and end
    "rows": _TABLE_OF_INTS,  # (blocks, BLOCK)
    "keys": _TABLE_OF_LONGS,  # (blocks, BLOCK) of these rows
    "stock": _INTS,  # (1 + blocks,) how many blocks are in no set, and these
    "last": _TABLE_OF_LONGS,  # (sets, 2) which block of a set, and place in it, was last asked for
}
Ordered = namedtuple("Ordered", ORDERED_FIELDS)
ORDERED = NamedTuple(tuple(ORDERED_FIELDS.values()), Ordered)
_ENTRIES = 1 + len(ORDERED_FIELDS)
SETS = int64
"""Address of the number of rows, and behind it those of ``ORDERED_FIELDS``: so many arrays as
arguments would take longer than what is done with a row."""


@compiled(int64(int64), inline=True)
def most_blocks(rows):
    """Blocks of a set at most: two that follow each other are half full together."""
    return 4 * rows // BLOCK + 3


@compiled(ORDERED(SETS), inline=True)
def ordered(sets):
    """The arrays of all sets."""
    entries = carray(pointer(sets), _ENTRIES, np.int64)
    rows, at = entries[0], entries[1:]
    most = most_blocks(rows)
    return Ordered(
        carray(pointer(at[0]), rows, np.uint16),
        carray(pointer(at[1]), (rows, N_SETS), np.int64),
        carray(pointer(at[2]), N_SETS, np.int64),
        carray(pointer(at[3]), N_SETS, np.int64),
        carray(pointer(at[4]), (N_SETS, most), np.int32),
        carray(pointer(at[5]), N_SETS * most, np.int32),
        carray(pointer(at[6]), N_SETS * most, np.int32),
        carray(pointer(at[7]), (N_SETS * most, BLOCK), np.int32),
        carray(pointer(at[8]), (N_SETS * most, BLOCK), np.int64),
        carray(pointer(at[9]), N_SETS * most + 1, np.int32),
        carray(pointer(at[10]), (N_SETS, 2), np.int64),
    )


@compiled(boolean(SETS, int64, int64, int64, int64, int64), inline=True)
def _belongs(sets, number, at, place, key, row):
    """Whether a row with a key belongs at a place of a block, without a look at other blocks:
    False where those may matter."""
    s = ordered(sets)
    block = s.blocks[number, at]
    begin, end = s.begin[block], s.end[block]
    if place <= begin:
        return place == begin and place < end and s.rows[block, place] == row
    if place >= end:
        return False
    before, there = s.keys[block, place - 1], s.keys[block, place]
    return (before < key or (before == key and s.rows[block, place - 1] < row)) and (
        key < there or (key == there and row <= s.rows[block, place])
    )


@compiled(UniTuple(int64, 2)(SETS, int64, int64, int64))
def _find(sets, number, key, row):
    """Which block of a set a row with a key belongs to, and where in it. Rows of one path come one
    after the other, so most belong beside the one before."""
    s = ordered(sets)
    at, place = s.last[number, 0], s.last[number, 1]
    if at < s.lengths[number]:
        if _belongs(sets, number, at, place + 1, key, row):
            s.last[number, 1] = place + 1
            return at, place + 1
        if _belongs(sets, number, at, place - 1, key, row):
            s.last[number, 1] = place - 1
            return at, place - 1
        if _belongs(sets, number, at, place, key, row):
            return at, place
    low, high = int64(0), s.lengths[number] - 1
    while low < high:
        middle = (low + high + 1) >> 1
        block = s.blocks[number, middle]
        begin = s.begin[block]
        first = s.keys[block, begin]
        if first < key or (first == key and s.rows[block, begin] <= row):
            low = middle
        else:
            high = middle - 1
    at, block = low, s.blocks[number, low]
    low, high = int64(s.begin[block]), int64(s.end[block])
    while low < high:
        middle = (low + high) >> 1
        there = s.keys[block, middle]
        if there < key or (there == key and s.rows[block, middle] < row):
            low = middle + 1
        else:
            high = middle
    s.last[number, 0], s.last[number, 1] = at, low
    return at, low


@compiled(int64(SETS, int64, int64))
def _new_block(sets, number, at):
    """Give a set an empty block."""
    s = ordered(sets)
    block = int64(s.stock[s.stock[0]])
    s.stock[0] -= 1
    for i in range(s.lengths[number], at, -1):
        s.blocks[number, i] = s.blocks[number, i - 1]
    s.blocks[number, at] = block
    s.lengths[number] += 1
    s.begin[block] = s.end[block] = 0
    return block


@compiled(void(SETS, int64, int64))
def _give_back(sets, number, at):
    """Take a block from a set."""
    s = ordered(sets)
    s.stock[0] += 1
    s.stock[s.stock[0]] = s.blocks[number, at]
    s.lengths[number] -= 1
    for i in range(at, s.lengths[number]):
        s.blocks[number, i] = s.blocks[number, i + 1]


@compiled(void(SETS, int64, int64, int64, int64))
def _shift(sets, block, first, last, by):
    """Move the rows of a block from place ``first`` up to ``last`` by one place, up or down."""
    s = ordered(sets)
    # places are never counted from the end, and known not to be: many rows are moved at once
    keys, rows = s.keys[block], s.rows[block]
    if by < 0:
        for i in range(uint64(first), uint64(last)):
            keys[i - uint64(1)] = keys[i]
        for i in range(uint64(first), uint64(last)):
            rows[i - uint64(1)] = rows[i]
        return
    i = uint64(last)
    while i > uint64(first):
        keys[i] = keys[i - uint64(1)]
        i -= uint64(1)
    i = uint64(last)
    while i > uint64(first):
        rows[i] = rows[i - uint64(1)]
        i -= uint64(1)


@compiled(void(SETS, int64, int64, int64))
def _move(sets, block, first, other):
    """Move the rows of a block from one on behind those of another block."""
    s = ordered(sets)
    there = int64(0)
    for i in range(s.begin[other], s.end[other]):
        s.keys[other, there], s.rows[other, there] = s.keys[other, i], s.rows[other, i]
        there += 1
    for i in range(first, s.end[block]):
        s.keys[other, there], s.rows[other, there] = s.keys[block, i], s.rows[block, i]
        there += 1
    s.end[block], s.begin[other], s.end[other] = first, 0, there


@compiled(int64(SETS, int64, int64))
def _room_behind(sets, number, last):
    """A block with room at its end for what comes behind all rows of a set: the last one, of
    which half is gone, or a new one."""
    s = ordered(sets)
    if s.begin[last] < _HALF:
        return _new_block(sets, number, s.lengths[number])
    count = int64(s.end[last] - s.begin[last])
    for i in range(count):
        there = s.begin[last] + i
        s.keys[last, i], s.rows[last, i] = s.keys[last, there], s.rows[last, there]
    s.begin[last], s.end[last] = 0, count
    return last


@compiled(void(SETS, int64, int64, int64))
def put(sets, number, row, key):
    """Put a row into a set that it is not in."""
    s = ordered(sets)
    s.members[row] |= uint16(1 << number)
    s.key[row, number] = key
    s.sizes[number] += 1
    if s.lengths[number] == 0:
        _new_block(sets, number, 0)
    last = int64(s.blocks[number, s.lengths[number] - 1])
    end = int64(s.end[last])
    if end == 0 or s.keys[last, end - 1] < key:
        # most come behind all others
        if end == BLOCK:
            last = _room_behind(sets, number, last)
            end = int64(s.end[last])
        s.keys[last, end], s.rows[last, end] = key, row
        s.end[last] = end + 1
        return
    at, place = _find(sets, number, key, row)
    block = int64(s.blocks[number, at])
    if s.end[block] - s.begin[block] == BLOCK:
        _move(sets, block, _HALF, _new_block(sets, number, at + 1))
        at, place = _find(sets, number, key, row)
        block = int64(s.blocks[number, at])
    begin, end = int64(s.begin[block]), int64(s.end[block])
    if end == BLOCK or (begin > 0 and place - begin < end - place):
        _shift(sets, block, begin, place, -1)
        s.begin[block] = begin - 1
        place -= 1
        s.last[number, 1] = place
    else:
        _shift(sets, block, place, end, 1)
        s.end[block] = end + 1
    s.keys[block, place], s.rows[block, place] = key, row


@compiled(void(SETS, int64, int64))
def take(sets, number, row):
    """Take a row out of a set that it is in."""
    s = ordered(sets)
    s.members[row] &= ~uint16(1 << number)
    s.sizes[number] -= 1
    at = int64(0)
    block = int64(s.blocks[number, 0])
    begin = int64(s.begin[block])
    if s.rows[block, begin] == row:
        # most are the first
        s.begin[block] = begin = begin + 1
        end = int64(s.end[block])
    else:
        key = s.key[row, number]
        at, place = _find(sets, number, key, row)
        block = int64(s.blocks[number, at])
        begin, end = int64(s.begin[block]), int64(s.end[block])
        if place - begin < end - place:
            _shift(sets, block, begin, place, 1)
            s.begin[block] = begin = begin + 1
        else:
            _shift(sets, block, place + 1, end, -1)
            s.end[block] = end = end - 1
    if begin == end:
        _give_back(sets, number, at)
        return
    if end - begin > _HALF:
        return
    for upper in (at, at - 1):
        if upper >= 0 and upper + 1 < s.lengths[number]:
            one, other = s.blocks[number, upper], s.blocks[number, upper + 1]
            if s.end[one] - s.begin[one] + s.end[other] - s.begin[other] <= _HALF:
                _move(sets, other, s.begin[other], one)
                _give_back(sets, number, upper + 1)
                return
