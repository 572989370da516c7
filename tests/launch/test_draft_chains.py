"""Drafts one behind the other, on the CPU platform."""

import pytest
import torch

from sglang_ext_cpu.draft_chains import advance

PADDED = [0, 3, 5], [3, 2, 4]
"""Where requests begin and how long they are; the third is padding."""


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (None, [11, 12, 100, 21, 200, 0, 0, 0, 0]),
        # accepted up to the second and the first token: those behind are of nobody
        ([1, 3], [11, 100, 12, 200, 21, 0, 0, 0, 0]),
    ],
)
def test_a_draft_goes_behind_its_request_and_padding_stays(
    last: list[int] | None, expected: list[int]
) -> None:
    tokens = torch.tensor([10, 11, 12, 20, 21, 0, 0, 0, 0])
    starts, lengths = map(torch.tensor, PADDED)
    places = None if last is None else torch.tensor(last)
    advance(tokens, starts, lengths, torch.tensor([[100], [200]]), places)
    assert tokens.tolist() == expected


def test_without_requests_there_is_nothing_to_move() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.zeros(4, dtype=torch.int64)
    assert advance(tokens, none, none, none.view(0, 1)).tolist() == [0, 0, 0, 0]
