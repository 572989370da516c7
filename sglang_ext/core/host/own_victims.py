"""What of one namespace may leave the host, in order."""

import heapq

import numpy as np

from sglang_ext.core.candidates import Candidates, Kind
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.host.tails import Tails
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.table import PageTable

_FEW = 64


class OwnVictims:
    """Of the pages of one namespace those that room on the host would take too, but for copies of
    what is on the device: of these it has those that lead to no window.

    It is told which pages have changed, and has what their columns say.

    Attributes:
        tails: last kept windows of prefixes, those first that are worth least.
        useless: rows, see ``Kind.USELESS``.
    """

    def __init__(self, table: PageTable, kept: KeptWindows, candidates: Candidates) -> None:
        self._table = table
        self._kept = kept
        self._candidates = candidates
        self.tails = Tails(table, candidates.tails.pinned)
        self.useless: set[int] = set()
        # age of the window by row, and a heap of (age, row); what differs is out of date
        self._superseded: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def look(self, rows: Rows) -> None:
        """Some of its pages have changed; each is there once."""
        candidates, kept = self._candidates, self._kept
        is_tail = kept.ends[rows] & (kept.below[rows] == 1)
        self.tails.look(np.where(is_tail, rows, ~rows).tolist())
        useless = candidates.is_in(rows, Kind.USELESS)
        self.useless.difference_update(rows[~useless].tolist())
        self.useless.update(rows[useless].tolist())
        superseded = candidates.is_in(rows, Kind.SUPERSEDED)
        for row in rows[~superseded].tolist():
            self._superseded.pop(row, None)
        rows = rows[superseded]
        for row, age in zip(rows.tolist(), self._table.swa_age[rows].tolist(), strict=True):
            if self._superseded.get(row) != age:
                self._superseded[row] = age
                heapq.heappush(self._heap, (age, row))
        if len(self._heap) > 2 * len(self._superseded) + _FEW:
            self._heap = [(age, row) for row, age in self._superseded.items()]
            heapq.heapify(self._heap)

    def forget(self, rows: Rows) -> None:
        """Pages belong to it no longer, or may not leave."""
        for row in rows.tolist():
            self.tails.places.pop(row, None)
            self._superseded.pop(row, None)
            self.useless.discard(row)

    def take_useless(self, count: int) -> Rows:
        """So many useless pages, or all; in order of their rows."""
        rows = heapq.nsmallest(count, self.useless)
        return np.array(rows, dtype=np.int64)

    def take_superseded(self) -> int | None:
        """The end of the window that was used least recently of those that others make up for; it
        has to be put back if it stays."""
        while self._heap:
            age, row = heapq.heappop(self._heap)
            if self._superseded.get(row) == age:
                return row
        return None

    def put_back(self, superseded: list[int], tails: list[int]) -> None:
        """Rows that were taken, and are what they were."""
        for row in superseded:
            if (age := self._superseded.get(row)) is not None:
                heapq.heappush(self._heap, (age, row))
        self.tails.put_back(tails)

    @property
    def rows(self) -> list[int]:
        """All that is listed, in no order."""
        return [*self.tails.places, *self._superseded, *self.useless]

    def listed(self) -> dict[str, list[int]]:
        """Rows of each list, rising; for the invariants."""
        return {
            "tails": sorted(self.tails.waiting()),
            "superseded": sorted(
                {row for age, row in self._heap if self._superseded.get(row) == age}
            ),
            "useless": sorted(self.useless),
        }
