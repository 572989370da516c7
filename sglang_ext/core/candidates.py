"""What eviction, room on the host and copies ahead of eviction take from, kept in order.

None of them looks at every row. Whoever changes a page notes it, and whoever asks has what was
noted looked at first: which of the sets a page belongs to follows from its columns alone.
"""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import candidates as loops
from sglang_ext.core.compiled import copies
from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.compiled.ordered import BLOCK, N_SETS, most_blocks
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.host.tails import Tails
from sglang_ext.core.table.columns import Rows, resident_zeros
from sglang_ext.core.table.table import PageTable

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NO_AGE = -(1 << 63)
_MOST_NOTED = 1 << 12
"""So many rows are noted before they are looked at, whether somebody asks or not."""


class Kind(enum.IntEnum):
    """Sets of pages, and in which order they are.

    A page is *needed* if something below it is on the host alone: if the device evicts it and
    it has no copy, that is lost with it.
    """

    VICTIMS = loops.VICTIMS
    """On the device and not locked; by age."""
    WINDOW_VICTIMS = loops.WINDOW_VICTIMS
    """The same for sliding-window copies; by their age."""
    DUPLICATES = loops.DUPLICATES
    """READY on the device and on the host, not locked there, not needed, not in storage; the most
    recently used first, and of one tick the deepest, so a path loses its end first."""
    STORED_DUPLICATES = loops.STORED_DUPLICATES
    """The same in storage."""
    NEEDED_DUPLICATES = loops.NEEDED_DUPLICATES
    """The same needed, in storage or not."""
    USELESS = loops.USELESS
    """Such pages of whatever kind that lead to no window on the host; by row."""
    WINDOW_DUPLICATES = loops.WINDOW_DUPLICATES
    """Ends of kept windows whose last page has its window on the device too; as ``DUPLICATES``."""
    SUPERSEDED = loops.SUPERSEDED
    """Ends of kept windows that are no longer worth it and have others below them; by the age of
    the window."""
    UNSAVED = loops.UNSAVED
    """On the device, with a window that is worth keeping and not kept on the host; by row."""


YOUNGEST_FIRST = (Kind.DUPLICATES, Kind.STORED_DUPLICATES, Kind.NEEDED_DUPLICATES)


class Candidates:
    """Sets of pages in order, of one table; see ``Kind``.

    Attributes:
        tails: the last kept windows of prefixes; ``look_at_tails`` has them up to date.
        state: what loops over the columns of the table and of the host take, see
            ``compiled.candidates``.

    Args:
        has_host: whether there is anything beside victims; without a host there is not.
    """

    def __init__(self, table: PageTable, kept: KeptWindows, *, has_host: bool) -> None:
        rows = table.capacity
        self._table = table
        self._has_host = has_host
        self._window_pages = table.geometry.window_pages
        self.tails = Tails(table)
        most = most_blocks(rows)
        stock = np.arange(N_SETS * most, -1, -1, dtype=np.int32)
        stock[0] = N_SETS * most
        self._sizes = np.zeros(N_SETS, dtype=np.int64)
        self._sets: dict[str, NDArray[Any]] = {
            "members": resident_zeros(rows, np.uint16),
            "key": np.empty((rows, N_SETS), dtype=np.int64),
            "sizes": self._sizes,
            "lengths": np.zeros(N_SETS, dtype=np.int64),
            "blocks": np.empty((N_SETS, most), dtype=np.int32),
            "begin": np.empty(N_SETS * most, dtype=np.int32),
            "end": np.empty(N_SETS * most, dtype=np.int32),
            "rows": np.empty((N_SETS * most, BLOCK), dtype=np.int32),
            "keys": np.empty((N_SETS * most, BLOCK), dtype=np.int64),
            "stock": stock,
            "last": np.zeros((N_SETS, 2), dtype=np.int64),
        }
        columns = {
            name: getattr(table, name) for name in ("device", "host", "swa_device", "swa_host")
        }
        numbers = ("off", "off_at", "off_first", "off_next", "off_before")
        self.arrays: dict[str, NDArray[Any]] = {
            **{
                name: getattr(table, name)
                for name in (
                    "parent",
                    "age",
                    "swa_age",
                    "resume",
                    "resume_if_room",
                    "stored",
                    "forks",
                    "space",
                    "depth",
                )
            },
            **{name: column.present for name, column in columns.items()},
            **{f"{name}_ready": column.ready for name, column in columns.items()},
            **{f"{name}_locks": column.locks for name, column in columns.items()},
            "ends": kept.ends,
            "below": kept.below,
            "uses": kept.uses,
            "pinned": kept.pinned,
            "bits": resident_zeros(rows, np.uint8),
            **{name: resident_zeros(rows, np.int32) for name in numbers},
            "todo": np.empty(rows, dtype=np.int32),
            "found": np.empty(rows, dtype=np.int64),
            "counts": np.zeros(2, dtype=np.int64),
            "tail_ages": resident_zeros(rows, np.int64),
            "tail_forks": resident_zeros(rows, np.int32),
            "held_at": resident_zeros(rows, np.int32),
            "window_held_at": resident_zeros(rows, np.int32),
            "held": np.zeros(rows, dtype=np.int64),
            "windows_held": np.zeros(rows, dtype=np.int64),
        }
        self._addresses = loops.state_of(self.arrays, self._sets)
        self.state = int(self._addresses.ctypes.data)
        self._looked: Callable[[Rows], None] | None = None
        self._noted: list[Rows] = []
        self._n_noted = 0
        # what cannot be evicted stays in its place until its turn comes, see ``compiled``
        table.device.tell(self.note, None, self.note)
        table.swa_device.tell(self.note, None, self.note)
        table.host.tell(self.note, self._note_ready, self._note_ready)
        table.swa_host.tell(self.note, None, None)
        kept.tell(self.note)
        table.when_renumbered.append(self.note_all)

    # ---- what changes ----------------------------------------------------------

    def note(self, rows: Rows) -> None:
        """Pages may belong elsewhere now: their copies, locks or ages have changed, or what
        is kept or stored of them."""
        if self._noted and self._noted[-1] is rows:
            return  # both copies of pages come and go together
        self._noted.append(rows)
        self._n_noted += len(rows)

    def _note_ready(self, rows: Rows) -> None:
        """Of paths that are locked on the host, most pages have no copy there yet."""
        self.note(rows[self._table.host.ready[rows]])

    def look_if_many(self) -> None:
        """Look at what was noted, if that is much; while no operation is half done."""
        if self._n_noted > _MOST_NOTED:
            self._look()

    def note_use(self, rows: Rows) -> None:
        """Pages have been used, whether their ages have changed or not."""
        self.arrays["tail_ages"][rows] = _NO_AGE
        self.note(rows)

    def keep_tail(self, row: int, *, kept: bool) -> None:
        """A pinned prefix ends with a row, or does no longer."""
        if kept:
            self.tails.pinned.add(row)
        else:
            self.tails.pinned.discard(row)
        self.note_use(np.array([row], dtype=np.int64))

    def note_all(self) -> None:
        """Ages have changed, or what all prefixes are worth. O(rows)."""
        self.arrays["tail_ages"][:] = _NO_AGE
        self.note(np.flatnonzero(self._table.parent != FREE))

    def _look(self) -> None:
        noted = self._noted
        if not noted:
            return
        rows = np.concatenate(noted) if len(noted) > 1 else np.ascontiguousarray(noted[0])
        self._noted, self._n_noted = [], 0
        if not self._has_host:
            loops.settle_victims(self.state, rows)
        elif tails := loops.settle(self.state, rows):
            self.tails.look(self.arrays["found"][:tails].tolist())
        if self._looked is not None:
            self._looked(rows)

    def tell_looked(self, looked: Callable[[Rows], None] | None) -> None:
        """Call somebody with the rows that were noted, as often as such are looked at; nobody for
        None."""
        self._looked = looked

    # ---- what there is -----------------------------------------------------------

    def size(self, kind: Kind) -> int:
        """Pages of a kind."""
        self._look()
        if kind is Kind.VICTIMS:
            return self._table.device.n_evictable
        if kind is Kind.WINDOW_VICTIMS:
            return self._table.swa_device.n_evictable
        return int(self._sizes[kind])

    def first(self, kind: Kind, count: int) -> Rows:
        """The first pages of a kind, in order; fewer if there are not so many."""
        count = min(count, self.size(kind))
        if count <= 0:
            return _NO_ROWS
        rows = np.empty(count, dtype=np.int64)
        found = loops.first_of(self.state, int(kind), rows)
        assert found == count, "fewer pages than counted"
        return rows

    def all(self, kind: Kind) -> Rows:
        """All pages of a kind, in order."""
        return self.first(kind, self._table.capacity)

    def youngest(self, kinds: tuple[Kind, ...], count: int, younger_than: int) -> Rows:
        """Up to ``count`` pages of kinds that have the most recently used first, of those whose
        age is more than a given one."""
        self._look()
        count = min(count, sum(int(self._sizes[kind]) for kind in kinds))
        if count <= 0:
            return _NO_ROWS
        rows = np.empty(count, dtype=np.int64)
        chosen = sum(1 << int(kind) for kind in kinds)
        return rows[: loops.first(self.state, chosen, younger_than, rows)]

    def on_both_tiers(self) -> int:
        """Copies on the host of what is on the device too, of both components."""
        self._look()
        full, windows = self.arrays["counts"].tolist()
        return int(full + windows)

    def are_needed(self, rows: Rows) -> NDArray[np.bool_]:
        """Which pages are needed, see ``Kind``."""
        self._look()
        needed: NDArray[np.bool_] = self.arrays["off"][rows] > 0
        return needed

    def with_descendants(self, rows: Rows) -> Rows:
        """Rows that leave the device and the table, and all below them: nothing below them is on
        the device but what is among them."""
        self._look()
        below = self.arrays["found"][: loops.off_below(self.state, np.ascontiguousarray(rows))]
        return np.sort(np.concatenate((rows, below))) if len(below) else rows

    def are_on_host_alone(self, rows: Rows) -> bool:
        """Whether pages have a copy on the host that nobody holds, and nothing else."""
        return bool(loops.are_on_host_alone(self.state, rows))

    def held(self, number: int) -> tuple[int, int]:
        """Pages that a namespace has on the host, and windows."""
        self._look()
        return self.held_at_last_look(number)

    def held_at_last_look(self, number: int) -> tuple[int, int]:
        """The same without a look, which may be some pages out of date; for metrics: ranks need
        not ask together."""
        return int(self.arrays["held"][number]), int(self.arrays["windows_held"][number])

    def is_in(self, rows: Rows, kind: Kind) -> NDArray[np.bool_]:
        """Which pages, that have been looked at, are of a kind other than victims."""
        members: NDArray[np.bool_] = (self._sets["members"][rows] >> int(kind) & 1).astype(bool)
        return members

    def tail_is_held(self, end: int) -> bool:
        """Whether a transfer uses the last kept window of a prefix, or goes on from what would be
        lost with it."""
        return bool(copies.tail_is_held(self.state, end, self._window_pages))

    def tail_stays(self, end: int) -> bool:
        """Whether the last kept window of a prefix cannot go now: a transfer uses it, or goes on
        from what would be lost with it, or it is on the device too."""
        return bool(copies.tail_stays(self.state, end, self._window_pages))

    def look_at_tails(self) -> Tails:
        """The tails as they are now."""
        self._look()
        return self.tails

    def children_off(self) -> NDArray[np.int32]:
        """(rows,) int32, children that are not on the device or have such a child. O(rows); for
        the invariants."""
        self._look()
        children: NDArray[np.int32] = self.arrays["off"].copy()
        return children
