"""What the core decides is what is on record, see ``tests.core.golden``."""

import json

import pytest

from tests.core import golden


@pytest.mark.parametrize("seed", range(0, golden.SEEDS, 25))
def test_decisions_are_those_on_record(seed: int) -> None:
    assert golden.digest_of(seed) == json.loads(golden.RECORD.read_text())[seed]


@pytest.mark.full
def test_all_decisions_are_those_on_record() -> None:
    assert golden.different(range(golden.SEEDS)) == []
