"""What the engine says of priorities, and what eviction makes of it."""

import sys

import pytest

from sglang_ext.adapter.handles import importance


@pytest.mark.parametrize(
    ("low_values_first", "least_first"),
    [
        # what the scheduler gives to requests without a priority is the first of each
        (False, (-sys.maxsize - 1, -3_000_000_000, -1, 0, 1, 3_000_000_000, sys.maxsize)),
        (True, (sys.maxsize, 3_000_000_000, 1, 0, -1, -3_000_000_000, -sys.maxsize - 1)),
    ],
)
def test_who_is_scheduled_first_stays_longest(
    low_values_first: bool, least_first: tuple[int, ...]
) -> None:
    kept = [importance(value, low_values_first=low_values_first) for value in least_first]
    assert kept == sorted(set(kept))
    assert all(-(1 << 63) <= value < 1 << 63 for value in kept)


@pytest.mark.parametrize("low_values_first", [False, True])
def test_no_priority_is_like_0(low_values_first: bool) -> None:
    """Where the engine does not schedule by priority, it leaves it out."""
    of_none, of_0 = (importance(p, low_values_first=low_values_first) for p in (None, 0))
    assert of_none == of_0
