"""What the core decides is what is on record, see ``tests.core.golden``."""

import pytest

from tests.core import golden

POLICIES = pytest.mark.parametrize("eviction", golden.SEEDS, ids=lambda name: name or "drawn")


@POLICIES
@pytest.mark.parametrize("part", range(12))
def test_decisions_are_those_on_record(eviction: str | None, part: int) -> None:
    seed = part * golden.SEEDS[eviction] // 12
    assert golden.digest_of(seed, eviction) == golden.recorded(eviction)[seed]


@pytest.mark.full
@POLICIES
def test_all_decisions_are_those_on_record(eviction: str | None) -> None:
    assert golden.different(eviction) == []
