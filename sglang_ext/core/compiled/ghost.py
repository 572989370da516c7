"""A prefix cache without KV: which pages it would hold; see ``retention.ghost.Ghost``."""

from collections import namedtuple
from typing import Any

import numpy as np
from numba.core.types import Array, NamedTuple, boolean, int16, int32, int64, uint64, void

from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.order import NONE, ORDER, cheapest, oldest, put, use

INTS = Array(int32, 1, "C")
LONGS = Array(int64, 1, "C")
DIGESTS = Array(uint64, 1, "C")
KINDS = Array(int16, 1, "C")

FIELDS = {
    "slots": INTS,  # (slots,) row, or NONE; open addressing
    "digest": DIGESTS,  # (rows,)
    "free": INTS,  # (rows,) a stack
    "counts": LONGS,  # free rows; room that is taken; room there is; longest path
}
_Arrays = namedtuple("GhostArrays", FIELDS)
GhostArrays: Any = _Arrays
GHOST = NamedTuple(tuple(FIELDS.values()), _Arrays)


@compiled(int64(GHOST, uint64))
def _home(ghost, digest):
    mixed = (digest ^ (digest >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(mixed >> np.uint64(20)) & (ghost.slots.size - 1)


@compiled(int64(GHOST, uint64))
def _slot(ghost, digest):
    """Where a digest is, or would be."""
    at = _home(ghost, digest)
    while ghost.slots[at] != NONE and ghost.digest[ghost.slots[at]] != digest:
        at = (at + 1) & (ghost.slots.size - 1)
    return at


@compiled(void(GHOST, int64))
def _forget(ghost, row):
    """A row leaves the index; what was displaced by it moves back."""
    mask = ghost.slots.size - 1
    hole = _slot(ghost, ghost.digest[row])
    at = hole
    while True:
        at = (at + 1) & mask
        other = ghost.slots[at]
        if other == NONE:
            break
        home = _home(ghost, ghost.digest[other])
        if ((at - home) & mask) >= ((at - hole) & mask):
            ghost.slots[hole] = other
            hole = at
    ghost.slots[hole] = NONE
    ghost.free[ghost.counts[0]] = row
    ghost.counts[0] += 1


@compiled(int64(GHOST, ORDER, DIGESTS, INTS, KINDS, int64, INTS, INTS, boolean, INTS))
def request(ghost, order, digests, room, kinds, tick, cells, ranks, learned, gone):
    """A request has used a path, which is here afterwards as far as it fits; room of the first
    pages that were here before. ``gone`` is scratch, (rows,)."""
    pages = min(digests.size, ghost.counts[3])
    hit, missed = 0, False
    path = np.empty(pages, dtype=np.int32)
    for i in range(pages):
        slot = _slot(ghost, digests[i])
        row = ghost.slots[slot]
        missed = missed or row == NONE
        if not missed:
            hit += room[i]
        if row == NONE:
            ghost.counts[0] -= 1
            row = ghost.free[ghost.counts[0]]
            ghost.slots[slot] = row
            ghost.digest[row] = digests[i]
            order.parent[row] = path[i - 1] if i else NONE
            order.room[row] = room[i]
            ghost.counts[1] += room[i]
        path[i] = row
    use(order, path, kinds[:pages], tick)
    put(order, 0, path)
    over = ghost.counts[1] - ghost.counts[2]
    if over > 0:
        if learned:
            found = cheapest(order, 0, over, cells, ranks, tick, gone)
        else:
            found = oldest(order, 0, over, gone)
        for i in range(found):
            row = gone[i]
            ghost.counts[1] -= order.room[row]
            _forget(ghost, row)
    return hit
