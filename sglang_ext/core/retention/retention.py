"""Who stays: what the cache asks, for each tier."""

from collections.abc import Sequence

from sglang_ext.core.retention.duel import Duel
from sglang_ext.core.retention.estimate import no_estimate
from sglang_ext.core.retention.order import Order, Rows
from sglang_ext.core.retention.returns import Digests, Kinds, Returns

REBUILD = 200
"""Requests between two tables."""
ENOUGH = (1 << 30) // 5
"""A chance of one in five, in 2**-30: a copy has to be used."""
_RATE_SHIFT = 4
"""What goes to make room is worth about what the last 16 evictions took."""


class Retention:
    """One history for all tiers, one table of what pages are worth, and a duel for each tier.

    Args:
        tiers: pages of each; of a tier below another one, those of both.
        depth_cost: see ``Estimate.of``.
        rebuild: requests between two tables.

    Attributes:
        estimate: the table that holds now. It changes every ``rebuild`` requests.
        tick: requests so far.
    """

    def __init__(self, tiers: Sequence[int], depth_cost: int = 0, rebuild: int = REBUILD) -> None:
        self.rebuild = rebuild
        self._returns = Returns(max(tiers))
        self._duels = [Duel(pages) for pages in tiers]
        self._depth_cost = depth_cost
        self.estimate = no_estimate()
        self.tick = 0
        self._rates = [0] * len(tiers)

    def learned(self, tier: int) -> bool:
        """Whether the table decides in a tier; else the least recently used page goes."""
        return self._duels[tier].learned

    def found(self, tier: int) -> tuple[int, int]:
        """(least recently used, learned): what each rule would have found of late."""
        return self._duels[tier].found

    @property
    def ends(self) -> tuple[int, int]:
        """See ``Returns.ends``."""
        return self._returns.ends

    def request(self, digests: Digests, prompt: int | None = None, apart: int = 1) -> Kinds:
        """A request has used a path; the classes of its pages, see ``Returns.observe``.

        Args:
            digests: (n,) of its pages, for the whole prefix each; at least one.
            prompt: pages that it has asked for, at least 1; all unless told. Those behind are its
                answer.
            apart: see ``Returns.observe``.

        Mutates: the next tick begins.
        """
        self.tick += 1
        kinds = self._returns.observe(digests, prompt or len(digests), self.tick, apart)
        for duel in self._duels:
            duel.request(digests, kinds, self.tick, self.estimate)
        if self.tick % self.rebuild == 0:
            self.estimate = self._returns.estimate(self.tick, self._depth_cost)
            for duel in self._duels:
                duel.settle()
        return kinds

    def evict(self, tier: int, order: Order, pages: int) -> Rows:
        """Remove and return up to so many rows of a tier; ``order`` has a lane for each."""
        lane = order.lanes[tier]
        if not self.learned(tier):
            self._rates[tier] = 0
            return lane.oldest(pages)
        rows = lane.cheapest(pages, self.estimate, self.tick)
        if len(rows):
            kind, used = order.use_of(int(rows[-1]))
            value = self.estimate.value(kind, self.tick - used)
            self._rates[tier] += (value - self._rates[tier]) >> _RATE_SHIFT
        return rows

    def worth_admission(self, tier: int, kind: int, used: int) -> bool:
        """Whether a page is worth a copy in a tier.

        Where the least recently used page goes, everything is. Else it has to be likely enough
        that the page is used before it is worth less than what goes to make room there.

        Args:
            kind: class of the page.
            used: tick of its last use.
        """
        if not self.learned(tier):
            return True
        chance = self.estimate.returns_while_worth(kind, self.tick - used, self._rates[tier])
        return chance >= ENOUGH
