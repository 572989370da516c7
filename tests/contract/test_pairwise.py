"""Cells that stand for a matrix have every pair of its values."""

import itertools

from tests.e2e import test_token_exact
from tests.fixtures.pairwise import cover, pairs


def test_every_pair_of_values_is_in_a_cell() -> None:
    matrix = list(itertools.product("abc", "de", "fgh", "ij"))
    chosen = cover(matrix)
    for one, other in itertools.combinations(range(4), 2):
        wanted = {(cell[one], cell[other]) for cell in matrix}
        assert {(cell[one], cell[other]) for cell in chosen} == wanted
    assert len(chosen) <= 10, "nine is the least that there can be"


def test_pairs_that_cannot_be_are_not_wanted() -> None:
    assert cover([("device", ""), ("host", "late")]) == [("device", ""), ("host", "late")]


def test_the_cells_of_the_oracle_meet_all_pairs() -> None:
    """Of page, window, chunk, tier, policy and ranks; a tier has a policy or there is none."""
    matrix, chosen = test_token_exact.MATRIX, test_token_exact.PAIRWISE
    assert len(matrix) == 3 * 3 * 2 * (1 + 2 * 3) * 2
    assert set().union(*map(pairs, matrix)) == set().union(*map(pairs, chosen))
    assert len(chosen) <= 12
