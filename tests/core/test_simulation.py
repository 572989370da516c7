"""Seeded traffic: many seeds, no contradiction, and rare transitions were reached."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from sglang_ext.core.compiled.candidates import ANY_AGE
from sglang_ext.core.compiled.loop_sets import COMPILED
from sglang_ext.core.eviction_policy import EVERY
from sglang_ext.core.host.room import HostRoom
from sglang_ext.core.plan import Hold
from sglang_ext.core.storage import prefetches
from sglang_ext.core.storage.prefetches import Prefetches
from sglang_ext.testing.simulation import Simulation
from sglang_ext.testing.watch import ModelError

SEEDS, STEPS = 60, 600
FEW = (*range(20), 52, 56)
"""Without ``--full``. In the last two pages move on the host."""


@pytest.fixture(scope="module")
def reached(full: bool) -> set[str]:
    """What happened in all seeds together. A failing seed is in the traceback."""
    seen: set[str] = set()
    for seed in range(SEEDS) if full else FEW:
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


STORED_SEEDS = (8, 9, 18, 7, 13, 46)
"""Seeds in which a model without storage would find contradictions."""


def run_with_storage(seeds: Iterable[int], overlap: int = 0) -> set[str]:
    """What happened in all seeds together, beside the model."""
    reached: set[str] = set()
    for seed in seeds:
        simulation = Simulation(
            seed, modelled=True, storage=True, overlap=overlap, loops=(COMPILED,)
        )
        simulation.run(STEPS)
        reached |= simulation.engine.seen
        counters = simulation.engine.index.counters.as_dict()
        reached |= {name for name, count in counters.items() if count}
    return reached


@pytest.mark.parametrize("overlap", [0, 1])
def test_with_storage_the_model_agrees(overlap: int) -> None:
    reached = run_with_storage(STORED_SEEDS, overlap)
    assert {"prefetch", "persist", "prefetched_pages", "reclaimed_duplicate_pages"} <= reached


def an_early_copy_takes_what_storage_has_not(patch: pytest.MonkeyPatch) -> None:
    original = HostRoom.make_without_loss

    def make(self: HostRoom, space: Any, pages: int, *, recycle: bool) -> None:
        original(self, space, pages, recycle=recycle)
        self._drop_duplicates(space, pages, ANY_AGE)

    patch.setattr(HostRoom, "make_without_loss", make)


def a_prefetch_takes_what_it_continues(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefetches, "Hold", lambda *parts: Hold())


def a_window_that_was_read_is_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prefetches, "_publish_window", lambda self, path, stage: None)


@pytest.mark.parametrize(
    "seed_bug",
    [
        an_early_copy_takes_what_storage_has_not,
        a_prefetch_takes_what_it_continues,
        a_window_that_was_read_is_left_out,
    ],
    ids=lambda bug: bug.__name__,
)
def test_the_model_finds_a_bug_of_storage(
    seed_bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_bug(monkeypatch)
    with pytest.raises(ModelError):
        run_with_storage(range(60))
