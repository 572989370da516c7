"""What the engine keeps of a prefix, and what a request is for the cache."""

import hashlib

from sglang_ext.core.table.columns import Rows


def request_number(rid: str) -> int:
    """The same for one request on every rank, and again after a retraction."""
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=7).digest(), "little")


def importance(priority: int | None, *, low_values_first: bool) -> int:
    """What eviction goes by, any 64-bit number: prefixes of larger ones stay longer.

    Args:
        priority: of a request, as the engine has it; None counts as 0.
        low_values_first: the engine runs requests of lower priority values first. Then those
            values matter more here too; the largest one is that of requests without any.
    """
    value = priority or 0
    return ~value if low_values_first else value


class Prefix:
    """A prefix in the table: what the engine keeps as a node handle.

    Attributes:
        cut: tokens at the end of the last page that are not in the prefix.
    """

    __slots__ = ("cut", "generation", "rows")

    def __init__(self, rows: Rows, generation: int, cut: int = 0) -> None:
        self.rows = rows
        self.generation = generation
        self.cut = cut
