"""The loops that a table runs: all of them compiled, or all of them as they are written.

There is one source. ``COMPILED`` is what servers run; ``sglang_ext.testing.interpreted`` makes
another set of the same functions for Python to execute.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import digests, loops, siblings, slots, windows


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Loops:
    """One set of all loops.

    Attributes:
        digests: the index of digests.
        windows: where a path can be resumed.
        siblings: over the children of a row.
        paths: over the rows of a path.
        slots: over rows of one column of slots.
        table: makes the argument that loops take as a table, of its ``Columns`` and of what
            ``arrays.addresses`` gives for them; both have to live as long.
    """

    digests: ModuleType
    windows: ModuleType
    siblings: ModuleType
    paths: ModuleType
    slots: ModuleType
    table: Callable[[Any, NDArray[np.int64]], Any]


COMPILED = Loops(
    digests,
    windows,
    siblings,
    loops,
    slots,
    table=lambda columns, addresses: int(addresses.ctypes.data),
)
