"""Seeded traffic: many seeds, no contradiction, and rare transitions were reached."""

import pytest

from sglang_ext.core.eviction_policy import EVERY
from sglang_ext.testing.simulation import Simulation

SEEDS, STEPS = 60, 600
FEW = (*range(20), 33, 37)
"""Without ``--full``. In the last two pages move on the host."""


@pytest.fixture(scope="module")
def reached(pytestconfig: pytest.Config) -> set[str]:
    """What happened in all seeds together. A failing seed is in the traceback."""
    seen: set[str] = set()
    for seed in range(SEEDS) if pytestconfig.getoption("--full") else FEW:
        simulation = Simulation(seed, ranks=1 + seed % 3)
        simulation.run(STEPS)
        seen |= simulation.engine.seen
        counters = simulation.engine.index.counters.as_dict()
        seen |= {name for name, count in counters.items() if count}
    return seen


def test_rare_transitions_were_reached(reached: set[str]) -> None:
    """Traffic that never gets into trouble proves nothing."""
    wanted = {
        *("load", "load declined", "backup", "slide", "retracted", "demotion"),
        *("flush in flight", "host allocation failed"),
        *("demoted_pages", "dropped_pages", "evicted_host_pages", "evicted_host_window_pages"),
        *("reclaimed_duplicate_pages", "reclaimed_duplicate_window_pages"),
        *("failed_transfers", "abandoned_transfers", "loaded_window_pages"),
        *("declined_host_full", "declined_host_window_full", "declined_backlog"),
        *("declined_device_full", "moved_host_pages"),
    }
    assert wanted <= reached, f"never reached: {wanted - reached}"


@pytest.mark.parametrize("policy", EVERY)
def test_ranks_agree_with_every_policy(policy: str) -> None:
    for seed in range(2):
        simulation = Simulation(seed, ranks=2, eviction=policy)
        simulation.run(300)
        assert simulation.engine.index.counters.dropped_pages > 0
