"""The last kept windows of prefixes, those that are worth least first."""

import heapq
from collections.abc import Iterator

import numpy as np

from sglang_ext.core.table.prospects import Place
from sglang_ext.core.table.table import PageTable

_FEW = 64
_PINNED = 1 << 30
"""Rank of those that stay whatever they are worth; no policy has so many."""
_COME = -1
"""In place of uses, for what is in no class yet."""


class Tails:
    """Ends of kept windows with no other below them.

    What they are worth falls with time, see ``Prospects``, and by how much depends on how often
    they were used, or on what else. So those of which that is the same, of one rank, are a class
    in which the order stays; of all classes, the first ones are compared.

    Attributes:
        pinned: rows that are never taken, tails or not; those of others if they are given.
    """

    def __init__(self, table: PageTable, pinned: set[int] | None = None) -> None:
        self._table = table
        self.places: dict[int, Place] = {}
        self.pinned: set[int] = set() if pinned is None else pinned
        # by rank and uses, heaps of (last use, row); what is not in ``places`` is out of date
        self._classes: dict[int, dict[int, list[tuple[int, int]]]] = {}
        self._entries = 0

    def look(self, found: list[int]) -> None:
        """Some rows have changed.

        Args:
            found: rows that are tails, and ``~row`` for those that are none.
        """
        tails = []
        for row in found:
            if row < 0:
                self.places.pop(~row, None)
            else:
                tails.append(row)
        if tails:
            for row, place in zip(tails, self.places_of(tails), strict=True):
                if self.places.get(row) != place:
                    self._put(row, place)
        if self._entries > 2 * len(self.places) + _FEW:
            self._forget_what_is_out_of_date()

    def places_of(self, rows: list[int]) -> list[Place]:
        """Where rows belong."""
        places = self._table.prospects.places_of(np.array(rows, dtype=np.int64))
        if not self.pinned:
            return places
        pinned = self.pinned
        return [
            (_PINNED, 0, 0) if row in pinned else place
            for row, place in zip(rows, places, strict=True)
        ]

    def _put(self, row: int, place: Place) -> None:
        self.places[row] = place
        rank, uses, last = place
        heapq.heappush(self._classes.setdefault(rank, {}).setdefault(uses, []), (last, row))
        self._entries += 1

    def _forget_what_is_out_of_date(self) -> None:
        self._classes, self._entries = {}, len(self.places)
        for row, (rank, uses, last) in self.places.items():
            self._classes.setdefault(rank, {}).setdefault(uses, []).append((last, row))
        for classes in self._classes.values():
            for heap in classes.values():
                heapq.heapify(heap)

    def classify_anew(self) -> None:
        """Other things say now what prefixes are worth: all of them belong elsewhere. O(tails)."""
        rows = list(self.places)
        self.places = dict(zip(rows, self.places_of(rows), strict=True))
        self._forget_what_is_out_of_date()

    def rising(self, limit: float, come: list[int]) -> Iterator[int]:
        """Ends that are worth less than ``limit``, those first that are worth least. Each is taken:
        it has to be put back unless it is a tail no longer.

        Args:
            come: whoever takes one adds what is a tail in its place, and this empties it; nothing
                else changes meanwhile. If that is of another rank, this ends with its own: a look
                tells where it belongs.
        """
        is_complete = True
        while self._classes:
            rank = min(self._classes)
            if rank == _PINNED:
                return
            classes, worth_of = self._classes[rank], self._table.prospects.worth_of
            first = [
                (worth_of((rank, uses, last)), row, uses)
                for uses in list(classes)
                for last, row in self._first_of(rank, uses)
            ]
            heapq.heapify(first)
            while first:
                worth, row, uses = first[0]
                if worth >= limit:
                    return
                heapq.heappop(first)
                if uses != _COME:
                    self._take_first(classes[uses])
                yield row
                # these have no place before the next look
                for place, row in zip(self.places_of(come), come, strict=True) if come else ():
                    if place[0] == rank:
                        heapq.heappush(first, (worth_of(place), row, _COME))
                    else:
                        is_complete = False
                come.clear()
                if uses != _COME:
                    for last, row in self._first_of(rank, uses):
                        heapq.heappush(first, (worth_of((rank, uses, last)), row, uses))
            del self._classes[rank]
            if not is_complete:
                return

    def _take_first(self, heap: list[tuple[int, int]]) -> None:
        """Take the first one out of its class, where it may be more than once."""
        entry = heap[0]
        while heap and heap[0] == entry:
            heapq.heappop(heap)
            self._entries -= 1

    def _first_of(self, rank: int, uses: int) -> list[tuple[int, int]]:
        """(last use, row) of the first one of a class; empty if there is none."""
        heap = self._classes[rank][uses]
        while heap:
            last, row = heap[0]
            if self.places.get(row) == (rank, uses, last):
                return heap[:1]
            heapq.heappop(heap)
            self._entries -= 1
        del self._classes[rank][uses]
        return []

    def waiting(self) -> list[int]:
        """All of them, in no order."""
        return [
            row
            for rank, classes in self._classes.items()
            for uses, heap in classes.items()
            for last, row in set(heap)
            if self.places.get(row) == (rank, uses, last)
        ]

    def put_back(self, rows: list[int]) -> None:
        """Rows that were taken, and are tails as they were before."""
        for row in rows:
            if (place := self.places.get(row)) is not None:
                self._put(row, place)
