"""What retention does, in plain Python and without any thought of speed."""

import bisect
import dataclasses
from fractions import Fraction

from sglang_ext.core.compiled.bins import BINS, EDGES


def bin_of(age: int) -> int:
    return min(BINS - 1, bisect.bisect_right(EDGES[:BINS].tolist(), age) - 1)


@dataclasses.dataclass
class OrderModel:
    """One lane: which row goes first, by looking at all of them."""

    parent: list[int]
    here: set[int] = dataclasses.field(default_factory=set)
    locks: dict[int, int] = dataclasses.field(default_factory=dict)
    use: dict[int, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def touch(self, path: list[int], kinds: list[int], tick: int) -> None:
        for depth, row in enumerate(path):
            self.use[row] = tick, -depth, kinds[depth]

    def leaves(self) -> list[int]:
        parents = {self.parent[row] for row in self.here}
        return [row for row in self.here if row not in parents and not self.locks.get(row)]

    def oldest(self) -> int | None:
        return min(self.leaves(), key=self.use.__getitem__, default=None)

    def cheapest(self, ranks: list[int], now: int) -> int | None:
        def order(row: int) -> tuple[int, int, int]:
            tick, depth, kind = self.use[row]
            return ranks[kind * BINS + bin_of(now - tick)], tick, depth

        return min(self.leaves(), key=order, default=None)


@dataclasses.dataclass
class LifeTable:
    """Uses of single pages: events and exposure of one class, counted tick by tick."""

    events: list[int] = dataclasses.field(default_factory=lambda: [0] * BINS)
    exposure: list[int] = dataclasses.field(default_factory=lambda: [0] * BINS)

    def life(self, start: int, end: int, pages: int, *, returned: bool) -> None:
        for age in range(1, end - start + 1):
            self.exposure[bin_of(age)] += pages
        if returned:
            self.events[bin_of(end - start)] += pages


def index(chances: list[Fraction], start: int) -> Fraction:
    """The best ratio of uses to the ticks that a page stays, over all horizons."""
    left, stay, best = Fraction(1), Fraction(0), Fraction(0)
    for b in range(start, BINS):
        after = left * (1 - chances[b])
        stay += (left + after) / 2 * int(EDGES[b + 1] - EDGES[b])
        left = after
        if stay:
            best = max(best, (1 - left) / stay)
    return best
