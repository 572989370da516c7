"""A short storm of operators' calls on a real server."""

import dataclasses
from typing import Any

import pytest

from launch.server import dp_attention
from tests.e2e.conftest import RANKS
from tests.soak.storm import LATE, OPTIONS, passed, storm
from tests.soak.traffic import SOAK, ask

LEAST = 21
"""Calls that are made and requests that are completed, on a slow machine later than after the time
that is given here."""


@pytest.mark.parametrize(
    ("minutes", "dp"),
    [
        (0.25, 1),
        pytest.param(1.5, 1, marks=pytest.mark.full),
        pytest.param(1.5, 2, marks=pytest.mark.full, id="dp ranks"),
    ],
)
def test_a_storm_of_calls_costs_no_token_and_no_server(serve, minutes: float, dp: int) -> None:  # noqa: ANN001
    # conversations of fewer tokens than the device has
    traffic = dataclasses.replace(SOAK, conversations=8, rounds=3, parallel=8)
    more = ["--chunked-prefill-size", "512", "--enable-metrics"]
    with serve(128, "--disable-radix-cache", *more, tokens=16384) as server:
        pool = ask(server, traffic)
    ranks = RANKS if dp > 1 else {}
    several = dp_attention(dp) if dp > 1 else []

    def start() -> Any:
        return serve(128, *OPTIONS, *more, *several, **LATE, **ranks)

    result = storm(start, pool, 3, 16, minutes=minutes, dp=dp, least=LEAST)
    assert passed(result), result
    assert result["requests"]["completed"] >= LEAST, result
    assert sum(result["calls"].values()) >= LEAST, result
