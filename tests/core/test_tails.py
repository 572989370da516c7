"""Tails in the order of what they are worth, held to a list that is searched anew for each."""

import random
from typing import Any

import numpy as np

from sglang_ext.core.host.tails import Tails
from sglang_ext.core.table.prospects import Place

ROWS = 60


class Prospects:
    """Few values, so many are worth the same."""

    def __init__(self, rng: random.Random) -> None:
        self.places = {row: self.any(rng) for row in range(ROWS)}

    @staticmethod
    def any(rng: random.Random) -> Place:
        return (rng.randrange(2), rng.randrange(1, 5), rng.randrange(12))

    def places_of(self, rows: Any) -> list[Place]:
        return [self.places[row] for row in np.asarray(rows).tolist()]

    @staticmethod
    def worth_of(place: Place) -> float:
        rank, uses, last = place
        return rank * 100 + uses / (13 - last)


class Table:
    """What tails see of one."""

    def __init__(self, prospects: Prospects) -> None:
        self.prospects = prospects


def test_they_come_in_the_order_of_what_they_are_worth_now() -> None:
    """What comes in place of one that is gone takes its turn, and what is put back, or found again,
    is not there twice."""
    for seed in range(200):
        rng = random.Random(seed)
        prospects = Prospects(rng)
        tails = Tails(Table(prospects))  # type: ignore[arg-type]
        there = set(rng.sample(range(ROWS), 25))

        def worth(row: int, of: Prospects = prospects) -> float:
            return of.worth_of(of.places[row])

        tails.look(sorted(there))
        for _ in range(6):
            for row in rng.sample(range(ROWS), 5):  # used since, or a tail no longer, or again
                prospects.places[row] = prospects.any(rng)
                there ^= {row} if rng.random() < 0.3 else set()
                tails.look([row if row in there else ~row])
            limit, come, spared, gone = rng.uniform(0, 110), list[int](), list[int](), set[int]()
            most, is_of_another_rank = rng.randrange(12), False
            for row in tails.rising(limit, come):
                assert worth(row) == min(map(worth, there - set(spared))) < limit
                if rng.random() < 0.3:
                    spared.append(row)
                else:
                    there.remove(row)
                    gone.add(row)
                    if others := sorted(set(range(ROWS)) - there - gone):
                        come.append(other := rng.choice(others))
                        there.add(other)
                        # no path has less behind than in front
                        places, rank = prospects.places, prospects.places[row][0]
                        places[other] = (max(rank, places[other][0]), *places[other][1:])
                        is_of_another_rank |= places[other][0] != rank
                if len(gone) >= most:
                    break
            else:
                left = min(map(worth, there - set(spared)), default=limit)
                assert left >= limit or is_of_another_rank
            tails.look([*(~row for row in gone - there), *there])
            tails.put_back(spared)
            assert set(tails.places) == there
            assert sorted(tails.waiting()) == sorted(there)
