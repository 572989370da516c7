"""Much room at once: what goes together is what would go one after the other."""

import math

import pytest

from sglang_ext.core.device.look_ahead import STEPS_AFTER_A_FAILURE
from sglang_ext.core.host.room import NEEDED_NOW, Claim
from sglang_ext.core.plan import Transfer
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine, SimRequest
from tests.core.test_index import engine_with, prompt
from tests.failures.scenarios import ALL, PAGE, check_all, find, rows_of


def engine_of(checkpoint_pages: int = 2, host_window_pages: int = 300, **more: object) -> SimEngine:
    """A host with room for all, and a window on every second page."""
    return engine_with(
        device_pages=99,
        device_window_pages=99,
        host_pages=300,
        host_window_pages=host_window_pages,
        checkpoint_pages=checkpoint_pages,
        **more,  # type: ignore[arg-type]
    )


def computed(engine: SimEngine, pages: int, seed: int, priority: int = 0) -> SimRequest:
    """A request whose prompt has been computed, two pages at a time."""
    request = engine.start(prompt(pages, seed), priority=priority)
    while not request.done:
        engine.compute(request, 2 * PAGE)
        engine.demote()
        engine.settle()
    return request


def serve_prompts(engine: SimEngine, *seeds: int, pages: int = 8, priority: int = 0) -> None:
    for seed in seeds:
        engine.finish(computed(engine, pages, seed, priority))
        engine.settle()


def on_host_alone(*seeds: int, **sizes: int) -> SimEngine:
    """Prompts of 8 pages, the first one used least recently."""
    engine = engine_of(**sizes)
    serve_prompts(engine, *seeds)
    engine.index.evict_device(ALL, ALL)
    assert left(engine, *seeds) == [8] * len(seeds)
    return engine


def left(engine: SimEngine, *seeds: int) -> list[int]:
    """Pages that each prompt would find."""
    return [len(find(engine, prompt(8, seed)).rows) for seed in seeds]


@pytest.mark.parametrize("component", [0, 1])
def test_an_old_prompt_goes_whole_before_younger_ones_lose_their_ends(component: int) -> None:
    engine = on_host_alone(1, 2, 3, 4)
    space = (engine.index.host, engine.index.host_window)[component]
    engine.index.room.make(space, space.free_pages + 8, Claim(1 << 62, math.inf))
    assert left(engine, 1, 2, 3, 4) == [0, 8, 8, 8]
    check_all(engine, idle=True)


def test_nothing_of_a_high_priority_goes_before_all_of_a_low_one() -> None:
    engine = engine_of(eviction="priority")
    serve_prompts(engine, 1, priority=100)  # first, so it was used least recently
    serve_prompts(engine, 2, priority=0)
    engine.index.evict_device(ALL, ALL)
    engine.index.room.make(engine.index.host, engine.index.host.free_pages + 6, NEEDED_NOW)
    assert left(engine, 1, 2) == [8, 2]
    check_all(engine, idle=True)


def test_where_storage_reads_what_goes_more_goes_in_its_place() -> None:
    engine = on_host_alone(1, 2, 3, 4, checkpoint_pages=8)
    index = engine.index
    slots = index.table.host.slots[rows_of(engine, prompt(8, 1))].copy()
    index.host.pin(slots)
    free = index.host.free_pages
    assert index.room.make(index.host, free + 16, NEEDED_NOW).is_enough
    assert (index.host.detached, index.host.free_pages) == (8, free + 16)
    assert left(engine, 1, 2, 3, 4) == [0, 0, 0, 8]
    index.host.unpin(slots)
    assert index.host.free_pages == free + 24
    check_all(engine, idle=True)


def test_copies_do_not_pause_for_what_made_room_for_a_part() -> None:
    """One window finds room, the next one does not: nothing was dropped in vain."""
    engine = engine_of(host_window_pages=2, write=WritePolicy.WRITE_THROUGH)
    serve_prompts(engine, 1, pages=2)
    engine.index.evict_device(ALL, ALL)
    request = engine.start(prompt(4, 2))
    engine.compute(request, 4 * PAGE)
    plan = engine.index.backups.begin(rows_of(engine, prompt(4, 2)), make_room=True)
    assert isinstance(plan, Transfer)
    assert len(plan.window) == 2
    assert len(find(engine, prompt(2, 1)).rows) == 0
    steps, *_ = engine.index.ahead.private_state()
    assert 0 < steps < STEPS_AFTER_A_FAILURE


def test_early_copies_leave_a_part_free_for_those_that_are_needed() -> None:
    engine = engine_of(host_window_pages=48, pinned_share=1, write=WritePolicy.WRITE_BACK)
    request = engine.start(prompt(48, 2))
    while not request.done:
        engine.compute(request, 2 * PAGE)
    plan = engine.index.backups.begin(rows_of(engine, prompt(48, 2)), make_room=False)
    assert isinstance(plan, Transfer)
    assert (len(plan.window), engine.index.host_window.free_pages) == (42, 6)
