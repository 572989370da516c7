"""The arrays of a table as compiled loops take them: one argument instead of many."""

from collections import namedtuple
from typing import Any

import numba
import numpy as np
from numba import carray
from numba.core.types import Array, NamedTuple, Tuple, boolean, int8, int32, int64, uint64
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.memory import pointer

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
    "stored": BYTES,
    "window_stored": BYTES,
    "keyed": FLAGS,
    "last_request": LONGS,
    "device": FLAGS,
    "swa_device": FLAGS,
    "swa_locks": INTS,
    "swa_host_ready": FLAGS,
    "buckets": DIGESTS,
    "weights": LONGS,
    "links": SLOTS,
}
"""The arrays of a table, in the order in which ``TABLE`` has their addresses."""
Columns = namedtuple("Columns", FIELDS)
COLUMNS = NamedTuple(tuple(FIELDS.values()), Columns)
TABLE = int64
"""Address of what ``table_of`` gives: one number instead of many arrays, each of which would have
to be looked at in every call."""
_SIZES = 5
_ENTRIES = _SIZES + len(FIELDS)


def table_of(arrays: dict[str, NDArray[Any]], device_page: int) -> NDArray[np.int64]:
    """Rows, tokens of a page, buckets and links of a table and tokens of a device page, then the
    addresses of its arrays.

    Args:
        arrays: see ``FIELDS``; they have to live as long as the result is in use, and must not
            be replaced.
        device_page: tokens.
    """
    for name, type_ in FIELDS.items():
        assert numba.typeof(arrays[name]) == type_, f"{name} is not {type_}"
    sizes = *arrays["tokens"].shape, len(arrays["buckets"]), len(arrays["links"]), device_page
    return np.array([*sizes, *(arrays[name].ctypes.data for name in FIELDS)], dtype=np.int64)


@compiled(COLUMNS(TABLE))
def columns(table):
    """The arrays of a table."""
    entries = carray(pointer(table), _ENTRIES, np.int64)
    rows, width, buckets, links = entries[0], entries[1], entries[2], entries[3]
    at = entries[_SIZES:]
    return Columns(
        carray(pointer(at[0]), rows, np.int32),
        carray(pointer(at[1]), rows, np.int32),
        carray(pointer(at[2]), rows, np.uint64),
        carray(pointer(at[3]), (rows, width), np.int64),
        carray(pointer(at[4]), rows, np.int32),
        carray(pointer(at[5]), rows, np.int32),
        carray(pointer(at[6]), rows, np.int64),
        carray(pointer(at[7]), rows, np.int64),
        carray(pointer(at[8]), rows, np.int32),
        carray(pointer(at[9]), rows, np.int32),
        carray(pointer(at[10]), rows, np.int32),
        carray(pointer(at[11]), rows, np.bool_),
        carray(pointer(at[12]), rows, np.int8),
        carray(pointer(at[13]), rows, np.int8),
        carray(pointer(at[14]), rows, np.bool_),
        carray(pointer(at[15]), rows, np.int64),
        carray(pointer(at[16]), rows, np.bool_),
        carray(pointer(at[17]), rows, np.bool_),
        carray(pointer(at[18]), rows, np.int32),
        carray(pointer(at[19]), rows, np.bool_),
        carray(pointer(at[20]), buckets, np.uint64),
        carray(pointer(at[21]), width, np.int64),
        carray(pointer(at[22]), (links, 3), np.int32),
    )


@compiled(int64(TABLE))
def device_page_of(table):
    """Tokens of a device page."""
    return carray(pointer(table), _ENTRIES, np.int64)[_SIZES - 1]
