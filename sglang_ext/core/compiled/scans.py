"""Loops over other arrays."""

import numpy as np
from numba.core.types import Array, int32, int64, void
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled


@compiled(void(Array(int64, 2, "C"), Array(int32, 1, "C")))
def clear_rows(array: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
    """Set rows of an array to 0."""
    for i in range(rows.size):
        array[rows[i], :] = 0
