"""The oracle for rounded KV, by answers that are made up."""

import dataclasses

from tests.e2e.conversations import Answer
from tests.e2e.rounded import compare

CLEAR, NEAR = (-0.2, -1.7), (-0.80, -0.84)
EXPECTED = [Answer(0, turn, 9, 0, 0, 0, output=(5, 6), tops=(CLEAR, NEAR)) for turn in range(2)]


def with_first(output: tuple[int, ...], tops: tuple[tuple[float, float], ...]) -> list[Answer]:
    """The same answers but for the first."""
    return [dataclasses.replace(EXPECTED[0], output=output, tops=tops), EXPECTED[1]]


def test_what_rounding_moves_is_the_same_answer() -> None:
    moved = ((-0.23, -1.6), (-0.77, -0.9))
    assert compare(with_first((5, 6), moved), EXPECTED) == ([], 2)


def test_another_token_may_be_there_where_two_were_next_to_equal() -> None:
    """Its conversation has other prompts then, with which nothing can be compared."""
    assert compare(with_first((5, 7), (CLEAR, (-0.81, -0.82))), EXPECTED) == ([], 1)


def test_another_token_anywhere_else_is_wrong() -> None:
    wrong, _ = compare(with_first((4, 6), (CLEAR, NEAR)), EXPECTED)
    assert wrong == ["conversation 0 round 0: token 0 is 4, not 5"]


def test_the_same_token_of_other_kv_is_wrong() -> None:
    wrong, _ = compare(with_first((5, 6), ((-0.4, -1.1), NEAR)), EXPECTED)
    assert wrong == ["conversation 0 round 0: token 0 has -0.4, not -0.2"]
