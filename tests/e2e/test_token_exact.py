"""The oracle: with the cache on, every token equals the server without a cache."""

import time

import pytest

from launch.server import OURS
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import Traffic, converse, differences, hit_rates

TRAFFIC = Traffic(conversations=12, rounds=6)
# (page, window): the window is no multiple of the page, or smaller than it
CELLS = [(1, 128), (16, 128), (64, 128), (1, 100), (16, 100), (64, 100), (64, 16)]


@pytest.mark.parametrize("chunk", ["256", "-1"], ids=["chunked", "whole"])
@pytest.mark.parametrize(("page", "window"), CELLS)
def test_host_tier_is_token_exact(serve, reference, page: int, window: int, chunk: str) -> None:  # noqa: ANN001
    expected = reference(window, TRAFFIC)
    options = [*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4"]
    options += ["--page-size", str(page), "--chunked-prefill-size", chunk]
    with serve(window, *options) as server:
        answers = converse(server, TRAFFIC)
        time.sleep(0.5)  # the idle checks run in the scheduler's idle loop
        assert_idle_and_alive(server)
    assert not differences(expected, answers)
    rates = hit_rates(answers)
    assert rates["host_share"] >= 0.5, rates
    assert rates["hit_rate"] >= 0.6, rates


def test_hit_rate_is_not_below_stock_under_host_pressure(serve, reference) -> None:  # noqa: ANN001
    # one request at a time: no admission race, so the hits are the caches' own
    traffic = Traffic(fork=0.0, parallel=1, seed=3)
    options = ["--enable-hierarchical-cache", "--hicache-ratio", "2", "--page-size", "16"]
    options += ["--chunked-prefill-size", "256"]
    rates = []
    for selection in (OURS, ()):
        with serve(128, *selection, *options) as server:
            answers = converse(server, traffic)
            assert_idle_and_alive(server)
        rates.append(hit_rates(answers)["hit_rate"])
    ours, stock = rates
    assert ours >= stock
