"""Who stays: what the cache asks, for each tier."""

from collections.abc import Sequence

from sglang_ext.core.retention.duel import Duel
from sglang_ext.core.retention.estimate import no_estimate
from sglang_ext.core.retention.order import Order, Rows
from sglang_ext.core.retention.returns import Digests, Kinds, Returns

REBUILD = 200
"""Requests between two tables."""
_UNLIKELY = 1 << 26
"""A chance of one in 16, in 2**-30."""


class Retention:
    """One history for all tiers, one table of what pages are worth, and a duel for each tier.

    Args:
        tiers: pages of each; of a tier below another one, those of both.
        depth_cost: see ``Estimate.of``.

    Attributes:
        estimate: the table that holds now. It changes every REBUILD requests.
        tick: requests so far.
    """

    def __init__(self, tiers: Sequence[int], depth_cost: int = 0) -> None:
        self._returns = Returns(max(tiers))
        self._duels = [Duel(pages) for pages in tiers]
        self._depth_cost = depth_cost
        self.estimate = no_estimate()
        self.tick = 0

    def learned(self, tier: int) -> bool:
        """Whether the table decides in a tier; else the least recently used page goes."""
        return self._duels[tier].learned

    def found(self, tier: int) -> tuple[int, int]:
        """(least recently used, learned): what each rule would have found of late."""
        return self._duels[tier].found

    def request(self, digests: Digests) -> Kinds:
        """A request has used a path; the classes of its pages, see ``Returns.observe``.

        Mutates: the next tick begins.
        """
        self.tick += 1
        kinds = self._returns.observe(digests, self.tick)
        for duel in self._duels:
            duel.request(digests, kinds, self.tick, self.estimate)
        if self.tick % REBUILD == 0:
            self.estimate = self._returns.estimate(self.tick, self._depth_cost)
            for duel in self._duels:
                duel.settle()
        return kinds

    def evict(self, tier: int, order: Order, pages: int) -> Rows:
        """Remove and return up to so many rows of a tier."""
        if self.learned(tier):
            return order.cheapest(pages, self.estimate, self.tick)
        return order.oldest(pages)

    def worth_admission(self, tier: int, order: Order, kind: int, used: int, *, full: bool) -> bool:
        """Whether a page is worth a place in a tier.

        Where least recently used decides, everything is. Else it has to be worth more than what
        goes first to make room for it, and a return has to be likely enough to pay the copy.

        Args:
            order: of the tier.
            kind: class of the page.
            used: tick of its last use.
            full: something goes to make room.
        """
        if not self.learned(tier):
            return True
        age = self.tick - used
        estimate = self.estimate
        if estimate.returns_within(kind, age, estimate.longest) < _UNLIKELY:
            return False
        victim = order.next_cheapest(estimate, self.tick) if full else None
        if victim is None:
            return True
        kind_there, used_there = order.use_of(victim)
        there = estimate.value(kind_there, self.tick - used_there)
        return estimate.value(kind, age) > there
