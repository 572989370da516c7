"""What prefixes are worth to the host: how soon they are used again, as far as the past tells."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import RANK_SHIFT
from sglang_ext.core.eviction_policy import MOST_USES, expected_uses
from sglang_ext.core.table.columns import Rows

Place = tuple[int, int, int]
"""(rank, class, last use): of one rank and class, who was used later is worth more; of two ranks,
who has the larger one."""


class Prospects(Protocol):
    """Who tells that, of the pages with which prefixes end."""

    @property
    def requests_ended(self) -> int:
        """How many have; 0 where they are not counted."""

    def worth(self, rows: Rows) -> NDArray[np.float64]:
        """What prefixes are worth now: larger is more."""

    def places_of(self, rows: Rows) -> list[Place]:
        """Where prefixes belong; it changes with their use only."""

    def worth_of(self, place: Place) -> float:
        """``worth`` of the prefixes that belong there."""


class Ages(Protocol):
    """What of a table tells how prefixes were used; see ``PageTable``."""

    age: NDArray[np.int64]
    forks: NDArray[np.int32]
    tick: int

    def last_use(self, rows: Rows) -> NDArray[np.int64]:
        """Ticks in which pages were last used."""


class PastUses:
    """By the rank of the eviction policy, then by ``expected_uses``."""

    requests_ended = 0

    def __init__(self, table: Ages) -> None:
        self._table = table

    def worth(self, rows: Rows) -> NDArray[np.float64]:
        """See Prospects."""
        table = self._table
        rank = table.age[rows] >> RANK_SHIFT
        idle = table.tick - table.last_use(rows)
        return rank * MOST_USES + expected_uses(table.forks[rows], idle)

    def places_of(self, rows: Rows) -> list[Place]:
        """See Prospects."""
        table = self._table
        ranks = (table.age[rows] >> RANK_SHIFT).tolist()
        return list(
            zip(ranks, uses_of(table.forks[rows]), table.last_use(rows).tolist(), strict=True)
        )

    def worth_of(self, place: Place) -> float:
        """See Prospects."""
        rank, uses, last = place
        return rank * MOST_USES + uses / (self._table.tick - last + 1.0)


def uses_of(forks: NDArray[np.int32]) -> list[int]:
    """What ``expected_uses`` counts."""
    uses: list[int] = np.minimum(forks.astype(np.int64) + 1, int(MOST_USES) - 1).tolist()
    return uses
