"""A short storm of operators' calls on a real server."""

import dataclasses

import pytest

from tests.soak.storm import LATE, OPTIONS, passed, storm
from tests.soak.traffic import SOAK, ask


@pytest.mark.parametrize("minutes", [0.25, pytest.param(1.5, marks=pytest.mark.full)])
def test_a_storm_of_calls_costs_no_token_and_no_server(serve, minutes: float) -> None:  # noqa: ANN001
    # conversations of fewer tokens than the device has
    traffic = dataclasses.replace(SOAK, conversations=8, rounds=3, parallel=8)
    more = ["--chunked-prefill-size", "512", "--enable-metrics"]
    with serve(128, "--disable-radix-cache", *more, tokens=16384) as server:
        pool = ask(server, traffic)
    result = storm(lambda: serve(128, *OPTIONS, *more, **LATE), pool, 3, 16, minutes=minutes)
    assert passed(result), result
    assert result["requests"]["completed"] > 20, result
    assert sum(result["calls"].values()) > 15, result
