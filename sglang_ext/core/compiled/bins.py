"""Ages in bins that widen with age: whole numbers only, so that all ranks agree."""

import numpy as np
from numba.core.types import int64

from sglang_ext.core.compiled.build import compiled

_LINEAR = 4
"""Ages below this have a bin each; from there on every octave has as many."""
BINS = 48
"""The last one has no end; it begins at about 7,000 requests."""


@compiled(int64(int64))
def bin_of(age):
    """Bin of an age in ticks, at least 0."""
    if age < _LINEAR:
        return age
    octave = 0
    while age >= 2 * _LINEAR:
        age >>= 1
        octave += 1
    return min(BINS - 1, _LINEAR * octave + age)


def first_age(bin_: int) -> int:
    """The smallest age of a bin; of ``BINS`` where the last one is taken to end."""
    if bin_ < _LINEAR:
        return bin_
    octave, rest = divmod(bin_ - _LINEAR, _LINEAR)
    return (_LINEAR + rest) << octave


EDGES = np.array([first_age(bin_) for bin_ in range(BINS + 1)], dtype=np.int64)
EDGES.setflags(write=False)
