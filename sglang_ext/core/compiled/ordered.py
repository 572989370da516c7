"""Sets of rows in the order of a key each: a row goes in and comes out in O(log n), and the first
ones lie one behind the other.

A set is blocks of rows in order, and a list of its blocks; all sets take their blocks from one
stock. Of equal keys the smallest row comes first, so the order is the same however rows came in.
"""

from collections import namedtuple

from numba.core.types import Array, NamedTuple, int32, int64, uint16, uint64, void

from sglang_ext.core.compiled.build import compiled

_LONGS = Array(int64, 1, "C")
_INTS = Array(int32, 1, "C")
_TABLE_OF_INTS = Array(int32, 2, "C")
_TABLE_OF_LONGS = Array(int64, 2, "C")
BLOCK = 256
"""Rows of a block."""
_HALF = BLOCK // 2

ORDERED_FIELDS = {
    "members": Array(uint16, 1, "C"),  # (rows,) a bit for each set that a row is in
    "key": _TABLE_OF_LONGS,  # (rows, sets) the keys with which
    "sizes": _LONGS,  # (sets,) rows
    "lengths": _LONGS,  # (sets,) blocks
    "blocks": _TABLE_OF_INTS,  # (sets, ...) those of each set
    "fill": _INTS,  # rows of each block
    "rows": _TABLE_OF_INTS,  # (blocks, BLOCK)
    "keys": _TABLE_OF_LONGS,  # (blocks, BLOCK) of these rows
    "stock": _INTS,  # (1 + blocks,) how many blocks are in no set, and these
}
Ordered = namedtuple("Ordered", ORDERED_FIELDS)
ORDERED = NamedTuple(tuple(ORDERED_FIELDS.values()), Ordered)


def most_blocks(rows: int) -> int:
    """Blocks of a set at most: two that follow each other are half full together."""
    return 4 * rows // BLOCK + 3


@compiled(int64(ORDERED, int64, int64, int64))
def _block_of(s, number, key, row):
    """Which block of a set a row with a key belongs to."""
    low, high = int64(0), s.lengths[number] - 1
    while low < high:
        middle = (low + high + 1) >> 1
        block = s.blocks[number, middle]
        first = s.keys[block, 0]
        if first < key or (first == key and s.rows[block, 0] <= row):
            low = middle
        else:
            high = middle - 1
    return low


@compiled(int64(ORDERED, int64, int64, int64))
def _place_in(s, block, key, row):
    """Where in a block a row with a key belongs."""
    low, high = int64(0), int64(s.fill[block])
    while low < high:
        middle = (low + high) >> 1
        there = s.keys[block, middle]
        if there < key or (there == key and s.rows[block, middle] < row):
            low = middle + 1
        else:
            high = middle
    return low


@compiled(int64(ORDERED, int64, int64))
def _new_block(s, number, at):
    """Give a set an empty block."""
    block = int64(s.stock[s.stock[0]])
    s.stock[0] -= 1
    for i in range(s.lengths[number], at, -1):
        s.blocks[number, i] = s.blocks[number, i - 1]
    s.blocks[number, at] = block
    s.lengths[number] += 1
    s.fill[block] = 0
    return block


@compiled(void(ORDERED, int64, int64))
def _give_back(s, number, at):
    """Take a block from a set."""
    s.stock[0] += 1
    s.stock[s.stock[0]] = s.blocks[number, at]
    s.lengths[number] -= 1
    for i in range(at, s.lengths[number]):
        s.blocks[number, i] = s.blocks[number, i + 1]


@compiled(void(ORDERED, int64, int64, int64))
def _move(s, block, first, other):
    """Move the rows of a block from one on behind those of another block."""
    there = int64(s.fill[other])
    for i in range(first, s.fill[block]):
        s.keys[other, there], s.rows[other, there] = s.keys[block, i], s.rows[block, i]
        there += 1
    s.fill[block], s.fill[other] = first, there


@compiled(void(ORDERED, int64, int64, int64))
def put(s, number, row, key):
    """Put a row into a set that it is not in."""
    s.members[row] |= uint16(1 << number)
    s.key[row, number] = key
    s.sizes[number] += 1
    if s.lengths[number] == 0:
        _new_block(s, number, 0)
    last = int64(s.blocks[number, s.lengths[number] - 1])
    fill = int64(s.fill[last])
    if 0 < fill < BLOCK and s.keys[last, fill - 1] < key:
        # most come behind all others
        s.keys[last, fill], s.rows[last, fill] = key, row
        s.fill[last] = fill + 1
        return
    at = _block_of(s, number, key, row)
    block = int64(s.blocks[number, at])
    if s.fill[block] == BLOCK:
        new = _new_block(s, number, at + 1)
        # who is put behind all others goes on with an empty block
        is_last = at + 2 == s.lengths[number] and s.keys[block, BLOCK - 1] < key
        _move(s, block, BLOCK if is_last else _HALF, new)
        if is_last or s.keys[new, 0] < key or (s.keys[new, 0] == key and s.rows[new, 0] < row):
            block = new
    place = _place_in(s, block, key, row)
    keys, rows = s.keys[block], s.rows[block]
    # a place is never counted from the end, and known not to be: two copies of many rows at once
    i = uint64(s.fill[block])
    while i > uint64(place):
        keys[i] = keys[i - uint64(1)]
        i -= uint64(1)
    i = uint64(s.fill[block])
    while i > uint64(place):
        rows[i] = rows[i - uint64(1)]
        i -= uint64(1)
    keys[place], rows[place] = key, row
    s.fill[block] += 1


@compiled(void(ORDERED, int64, int64))
def take(s, number, row):
    """Take a row out of a set that it is in."""
    s.members[row] &= ~uint16(1 << number)
    s.sizes[number] -= 1
    key = s.key[row, number]
    at = _block_of(s, number, key, row)
    block = int64(s.blocks[number, at])
    place, left = _place_in(s, block, key, row), int64(s.fill[block]) - 1
    s.fill[block] = left
    keys, rows = s.keys[block], s.rows[block]
    for i in range(uint64(place), uint64(left)):
        keys[i] = keys[i + uint64(1)]
    for i in range(uint64(place), uint64(left)):
        rows[i] = rows[i + uint64(1)]
    if left == 0:
        _give_back(s, number, at)
        return
    for upper in (at, at - 1):
        if upper >= 0 and upper + 1 < s.lengths[number]:
            one, other = s.blocks[number, upper], s.blocks[number, upper + 1]
            if s.fill[one] + s.fill[other] <= _HALF:
                _move(s, other, 0, one)
                _give_back(s, number, upper + 1)
                return
