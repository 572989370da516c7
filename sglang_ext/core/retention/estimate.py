"""What a page is worth, by its class and its age."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import returns as loops
from sglang_ext.core.compiled.bins import BINS, EDGES, bin_of

CELLS = loops.CLASSES * BINS
Table = NDArray[np.int64]


def class_name(kind: int) -> str:
    """A class in words."""
    if kind < loops.LENGTHS:
        low, high = (1 << kind) >> 1, (1 << kind) - 1
        return (
            f"first turn, {low} pages and more"
            if kind == loops.LENGTHS - 1
            else (f"first turn, {low}-{high} pages")
        )
    kind -= loops.LENGTHS
    if kind < 2 * loops.TURNS:
        turn, adds_much = divmod(kind, 2)
        later = " and later" if turn == loops.TURNS - 1 else ""
        return f"turn {turn + 2}{later}, {'much' if adds_much else 'little'} new"
    kind -= 2 * loops.TURNS
    if kind < loops.SHARES:
        return f"shared, {1 << kind} forks and more"
    turn = kind - loops.SHARES + 1
    return f"answer of turn {turn}{' and later' if turn == loops.ANSWERS else ''}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Estimate:
    """A table of what pages are worth. Whole numbers, so all ranks have the same.

    Attributes:
        chances: (classes, bins) that a page of that age is used before it is older than the bin,
            in 2**-30.
        values: (classes, bins) uses per tick that it stays, in 2**-30, times what its loss costs.
        cells: (classes * bins,) int32, all cells ``class * bins + bin``; those of the least value
            first, of the same value the oldest.
        ranks: (classes * bins,) int32, where a cell is in ``cells``.
    """

    chances: Table
    values: Table
    cells: NDArray[np.int32]
    ranks: NDArray[np.int32]

    @property
    def longest(self) -> int:
        """Ticks that the table knows of."""
        return int(EDGES[BINS])

    @classmethod
    def of(cls, chances: Table, depths: Table, depth_cost: int = 0) -> "Estimate":
        """The table for chances.

        Args:
            depths: (classes,) mean depth of the pages of a class.
            depth_cost: pages before a page with which its recompute costs twice as much as
                without any, because of attention; 0: every page costs the same.
        """
        values = np.empty_like(chances)
        loops.worth(chances, values)
        if depth_cost > 0:
            # at most 64 times as much: what is deep costs more, and is not worth everything
            share = np.minimum((depths << 8) // depth_cost, 63 << 8)
            values = np.minimum(values, (1 << 40) - 1) * ((1 << 8) + share)[:, None] >> 8
        bins = np.tile(np.arange(BINS), loops.CLASSES)
        cells = np.lexsort((-bins, values.ravel())).astype(np.int32)
        ranks = np.empty_like(cells)
        ranks[cells] = np.arange(CELLS, dtype=np.int32)
        return cls(chances, values, cells, ranks)

    def value(self, kind: int, age: int) -> int:
        """What a page of a class and an age is worth."""
        return int(self.values[kind, bin_of(age)])

    def returns_within(self, kind: int, age: int, ticks: int) -> int:
        """Chance, in 2**-30, that such a page is used in the next ``ticks``, as whole bins."""
        first, last = bin_of(age), bin_of(age + ticks)
        left = 1 << loops.UNIT
        for chance in self.chances[kind, first : last + 1].tolist():
            left -= (left * chance) >> loops.UNIT
        return (1 << loops.UNIT) - left

    def returns_while_worth(self, kind: int, age: int, rate: int) -> int:
        """Chance, in 2**-30, that such a page is used before it is worth no more than ``rate``."""
        left = 1 << loops.UNIT
        first = bin_of(age)
        values, chances = self.values[kind, first:], self.chances[kind, first:]
        for value, chance in zip(values.tolist(), chances.tolist(), strict=True):
            if value <= rate:
                break
            left -= (left * chance) >> loops.UNIT
        return (1 << loops.UNIT) - left

    def explain(self) -> list[dict[str, Any]]:
        """Who stays how long: for each class (name, value in uses per 1,000 ticks when it was
        just used, share that is used again within 1,000 ticks, and the age at which it is worth
        less than half of that)."""
        rows = []
        for kind in range(loops.CLASSES):
            values = self.values[kind]
            worn = np.flatnonzero(2 * values < values[1])
            rows.append(
                {
                    "class": class_name(kind),
                    "uses_per_1000": round(1000 * int(values[1]) / (1 << loops.UNIT), 3),
                    "returns": round(self.returns_within(kind, 1, 1000) / (1 << loops.UNIT), 3),
                    "half_worth_at": int(EDGES[worn[0]]) if len(worn) else None,
                }
            )
        return rows


def no_estimate() -> Estimate:
    """Nothing is known."""
    zeros = np.zeros((loops.CLASSES, BINS), dtype=np.int64)
    return Estimate.of(zeros, np.zeros(loops.CLASSES, dtype=np.int64))
