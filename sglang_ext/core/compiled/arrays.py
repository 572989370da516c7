"""The arrays of a table as compiled loops take them: one argument instead of many."""

from collections import namedtuple
from typing import Any

import numba
import numpy as np
from numba.core.types import Array, NamedTuple, Tuple, boolean, int8, int32, int64, uint64
from numba.np.numpy_support import as_dtype
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.memory import pointer
from sglang_ext.core.compiled.returns import CLASSES

FLAGS = Array(boolean, 1, "C")
BYTES = Array(int8, 1, "C")
INTS = Array(int32, 1, "C")
LONGS = Array(int64, 1, "C")
DIGESTS = Array(uint64, 1, "C")
PAGES = Array(int64, 2, "C")
SLOTS = Array(int32, 2, "C")
FOUND = Tuple((int64, int64, int64, int64, int64))

FIELDS = {
    "parent": INTS,
    "depth": INTS,
    "digest": DIGESTS,
    "tokens": PAGES,
    "children": INTS,
    "generation": INTS,
    "age": LONGS,
    "swa_age": LONGS,
    "hits": INTS,
    "forks": INTS,
    "priority": INTS,
    "resume": FLAGS,
    "resume_if_room": FLAGS,
    "stored": BYTES,
    "window_stored": BYTES,
    "keyed": FLAGS,
    "last_request": LONGS,
    "kind": BYTES,
    "used": LONGS,
    "stay": LONGS,
    "device": FLAGS,
    "swa_device": FLAGS,
    "swa_locks": INTS,
    "swa_host_ready": FLAGS,
    "buckets": DIGESTS,
    "weights": LONGS,
    "links": SLOTS,
}
"""The arrays of a table. Each has an element for each row, unless it is in ``_SHAPES``."""
_SIZES = ("rows", "width", "n_buckets", "n_links", "device_page", "overlap")
"""What an address leads to first: rows, tokens of a name, buckets and links of a table, tokens of
a device page, and those that the names of pages have in common."""
_SHAPES = {
    "tokens": "(rows, width)",
    "buckets": "n_buckets",
    "weights": "width",
    "stay": str(CLASSES),
    "links": "(n_links, 4)",
}
Columns: Any = namedtuple("Columns", (*FIELDS, "device_page", "overlap"))
COLUMNS = NamedTuple((*FIELDS.values(), int64, int64), Columns)
TABLE = int64
"""Address of what ``addresses`` gives: one number instead of many arrays, each of which would have
to be looked at in every call."""


def addresses(table: Any) -> NDArray[np.int64]:
    """Sizes of a table, then the addresses of its arrays.

    Args:
        table: ``Columns``. Its arrays have to live as long as the result is in use, and must
            not be replaced.
    """
    for name, type_ in FIELDS.items():
        assert numba.typeof(getattr(table, name)) == type_, f"{name} is not {type_}"
    sizes = *table.tokens.shape, len(table.buckets), len(table.links), *table[-2:]
    return np.array([*sizes, *(array.ctypes.data for array in table[:-2])], dtype=np.int64)


def _source() -> str:
    """The function ``columns``, which has a line for each of ``FIELDS``."""
    lines = [f"{name} = at[{i}]" for i, name in enumerate(_SIZES)]
    for i, (name, type_) in enumerate(FIELDS.items(), start=len(_SIZES)):
        dtype = f"np.{as_dtype(type_.dtype).type.__name__}"
        lines.append(f"{name} = carray(pointer(at[{i}]), {_SHAPES.get(name, 'rows')}, {dtype})")
    body = "\n    ".join(lines)
    return f"""
def columns(table):
    at = carray(pointer(table), {len(_SIZES) + len(FIELDS)}, np.int64)
    {body}
    return Columns({", ".join(Columns._fields)})
"""


def _columns() -> Any:
    names = {"np": np, "carray": numba.carray, "pointer": pointer, "Columns": Columns}
    names["__name__"] = __name__
    exec(compile(_source(), __file__, "exec"), names)
    return compiled(COLUMNS(TABLE))(names["columns"])


columns = _columns()
"""The arrays of a table, of its address."""
