"""The oracle: with the cache on, every token equals the server without a cache."""

import time

import pytest

from launch.server import OURS
from launch.traffic import Traffic
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import converse, differences, hit_rates

TRAFFIC = Traffic(conversations=12, rounds=6)
# (page, window): the window is no multiple of the page, or smaller than it
SIZES = [(1, 128), (16, 128), (64, 128), (1, 100), (16, 100), (64, 100), (64, 16)]
LATER = ("write_back", "write_through_selective")
CELLS = [
    *((page, window, "256", "write_through") for page, window in SIZES),
    *((page, window, "-1", LATER[n % 2]) for n, (page, window) in enumerate(SIZES)),
]
# what a second request must have used is copied late or never
LEAST = {
    "write_through": (0.6, 0.5),
    "write_back": (0.6, 0.5),
    "write_through_selective": (0.3, 0.1),
}


@pytest.mark.parametrize(("page", "window", "chunk", "policy"), CELLS)
def test_host_tier_is_token_exact(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    page: int,
    window: int,
    chunk: str,
    policy: str,
) -> None:
    expected = reference(window, TRAFFIC)
    options = [*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4"]
    options += ["--page-size", str(page), "--chunked-prefill-size", chunk]
    options += ["--hicache-write-policy", policy]
    # half of them by the engine's copies, which are the default on GPUs
    copies = {"SGLANG_EXT_COPIES": "engine" if policy in LATER else "kernels"}
    with serve(window, *options, **copies) as server:
        answers = converse(server, TRAFFIC)
        time.sleep(0.5)  # the idle checks run in the scheduler's idle loop
        assert_idle_and_alive(server)
    assert not differences(expected, answers)
    rates = hit_rates(answers)
    hit_rate, host_share = LEAST[policy]
    assert rates["hit_rate"] >= hit_rate, rates
    assert rates["host_share"] >= host_share, rates


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
