"""Memory of a table that goes on to the next one when everything is forgotten."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.table.columns import resident_zeros

_T = TypeVar("_T", bound=np.generic)


class RowMemory:
    """Arrays by name, with an entry for each row.

    A flush takes as long as clearing what was used, and not as long as the system takes to find
    memory for a whole table.

    Attributes:
        used: rows ``[0, used)`` have been written to since the arrays were last handed out.
    """

    def __init__(self) -> None:
        self.used = 0
        self._arrays: dict[str, NDArray[Any]] = {}

    def zeros(self, name: str, shape: int | tuple[int, ...], dtype: type[_T]) -> NDArray[_T]:
        """An array of zeros; who has had one of this name before must use it no longer."""
        array: NDArray[_T] | None = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = resident_zeros(shape, dtype)
        else:
            array[: self.used] = 0
        return array

    def note(self, first: int, stop: int, capacity: int) -> None:
        """Rows from ``first`` on have been written to, up to ``stop``; if that is not behind it, up
        to the end and from the beginning."""
        self.used = max(self.used, stop if stop > first else capacity)

    def begin(self) -> None:
        """All arrays have been handed out; nothing is written yet."""
        self.used = 0
