"""Loops over other arrays."""

import numpy as np
from numba.core.types import Array, boolean, int32, int64, void
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled

_INTS = Array(int32, 1, "C")


@compiled(void(Array(int64, 2, "C"), _INTS))
def clear_rows(array: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Set rows of an array to 0."""
    for i in range(rows.size):
        row = rows[i]
        for place in range(array.shape[1]):
            array[row, place] = 0


@compiled(boolean(_INTS, Array(int64, 1, "C"), int64, _INTS, _INTS))
def slots_with_peers(
    tokens: NDArray[np.int32],
    peers: NDArray[np.int64],
    page: int,
    full: NDArray[np.int32],
    swa: NDArray[np.int32],
) -> bool:
    """Slots of the pages of a row of token indices, and their peers; whether all have one.

    Args:
        tokens: of as many pages as ``full`` and ``swa`` have room for.
        peers: of each token index, 0 for none.
        page: tokens.
    """
    have_peers = True
    if page == 1:  # two divisions a token would take most of the time
        for i in range(full.size):
            full[i], swa[i] = tokens[i], peers[tokens[i]]
            have_peers &= swa[i] != 0
        return have_peers
    for i in range(full.size):
        token = tokens[i * page]
        full[i] = token // page
        swa[i] = peers[token] // page
        have_peers &= swa[i] != 0
    return have_peers
