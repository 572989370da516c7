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

from sglang_ext.core.compiled import loops, scans, siblings


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Loops:
    """One set of all loops.

    Attributes:
        paths: over the rows of a path, and over one column of slots.
        siblings: over the children of a row.
        scans: over whole columns.
        table: makes the argument that loops take as a table, of its ``Columns`` and of what
            ``arrays.addresses`` gives for them; both have to live as long.
    """

    paths: ModuleType
    siblings: ModuleType
    scans: ModuleType
    table: Callable[[Any, NDArray[np.int64]], Any]


COMPILED = Loops(loops, siblings, scans, lambda columns, addresses: int(addresses.ctypes.data))
