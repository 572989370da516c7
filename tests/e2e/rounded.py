"""The oracle for KV that is rounded when it is written.

What is computed for an answer and for a prompt differs in its last bit, and about one number in a
million is then rounded to its other neighbor. The engine's own cache beside none gives other tokens
too, wherever two of them were next to equal. So log-probabilities are compared. Rounding moves them
by up to 0.033, most tokens lead by 0.67, and they are equal where no answer's KV was found
(measured on a tiny Gemma 4, fp8_e4m3, 54 requests).
"""

from collections.abc import Sequence
from typing import NamedTuple

from tests.e2e.conversations import Answer

ASKED = {"return_logprob": True, "top_logprobs_num": 2}
"""Fields of a request whose answer can be compared."""
MOVED = 0.1
"""How far rounding may move a log-probability, natural logarithm: three times what was measured. A
page of other tokens moves it by 0.4 and more (``test_fp8.py``)."""


class Comparison(NamedTuple):
    """Of two servers.

    Attributes:
        wrong: requests whose difference is not one of rounding.
        compared: how many requests had the same prompt.
    """

    wrong: list[str]
    compared: int


def compare(answers: Sequence[Answer], expected: Sequence[Answer]) -> Comparison:
    """All requests, until two tokens that were next to equal send a conversation another way.

    Args:
        answers: in the order in which they came.
    """
    by_key = {(answer.conversation, answer.round): answer for answer in expected}
    wrong, compared, other_way = [], 0, set()
    for answer in answers:
        if answer.conversation in other_way:
            continue
        compared += 1
        other = by_key[answer.conversation, answer.round]
        name = f"conversation {answer.conversation} round {answer.round}"
        pairs = zip(answer.output, answer.tops, other.output, other.tops, strict=True)
        for number, (token, (top, _), its_token, (its_top, its_second)) in enumerate(pairs):
            if token != its_token:
                other_way.add(answer.conversation)
                if its_top - its_second > 2 * MOVED:
                    wrong.append(f"{name}: token {number} is {token}, not {its_token}")
                break
            if abs(top - its_top) > MOVED:
                wrong.append(f"{name}: token {number} has {top}, not {its_top}")
                break
    return Comparison(wrong, compared)


def assert_same(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """But for rounding; and most of the requests could be compared."""
    comparison = compare(answers, expected)
    assert not comparison.wrong, comparison
    assert comparison.compared > len(expected) / 2
