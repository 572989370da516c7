"""Which pages of a path stand for those before them, so that a long path costs little more than a
short one."""

import numpy as np
from numba.core.types import Array, Tuple, int32, int64, uint64

from sglang_ext.core.compiled.build import compiled

_PER_OCTAVE = 5
"""Bits: 32 marks for each doubling of the depth; of the first 64 pages all are marks."""


@compiled(int64(int64))
def bits_of(number):
    """Bits that a number takes."""
    bits = 0
    while number > 0:
        number >>= 1
        bits += 1
    return bits


@compiled(int64(int64))
def next_mark(depth):
    """The mark behind one at ``depth``, the first one behind -1; it depends on nothing else, so
    paths that share a page agree."""
    return depth + (1 << max(0, bits_of(depth + 1) - _PER_OCTAVE - 1))


@compiled(Tuple((Array(int32, 1, "C"), Array(int32, 1, "C")))(Array(uint64, 1, "C"), int64))
def sampled(digests, rate_bits):
    """Depths of those marks of a path that are in a sample of one in ``1 << rate_bits``, and the
    pages that each stands for. A page is in the sample of all paths or of none."""
    depths = np.empty(digests.size, dtype=np.int32)
    pages = np.empty(digests.size, dtype=np.int32)
    count, before, depth = 0, -1, next_mark(-1)
    while depth < digests.size:
        mixed = digests[depth] * np.uint64(0x9FB21C651E98DF25)
        if mixed >> np.uint64(64 - rate_bits) == 0 if rate_bits else True:
            depths[count] = depth
            pages[count] = depth - before
            count += 1
        before, depth = depth, next_mark(depth)
    return depths[:count], pages[:count]
