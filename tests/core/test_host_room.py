"""Room on a host memory that both components share."""

import math

import numpy as np
import pytest

from sglang_ext.core.eviction_policy import MOST_USES
from sglang_ext.core.host.room import NEEDED_NOW, Claim
from sglang_ext.core.plan import Hold, TransferKind
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from tests.core.test_index import engine_with, prompt, serve, started
from tests.failures.scenarios import (
    ALL,
    PAGE,
    check_all,
    find,
    join,
    rows_of,
    run,
    serve_and_settle,
)


def sharing(host_pages: int, **sizes: int) -> SimEngine:
    """Extents of two window pages; a prompt of 4 pages has a window of 2."""
    return engine_with(host_pages=host_pages, host_window_pages=0, extent_pages=2, **sizes)


def back_up(engine: SimEngine, *seeds: int, pages: int = 4) -> None:
    for seed in seeds:
        serve(engine, prompt(pages, seed))
        engine.settle()


def test_windows_take_the_room_that_pages_leave() -> None:
    engine = sharing(60)
    back_up(engine, 1, 2, 3)
    usage = engine.index.host_tier.shared.arena.usage()
    assert usage["full"] > 0
    assert usage["window"] > 0
    assert sum(usage.values()) <= 60 * 16 * 2
    engine.check_every_slot()


def test_the_oldest_gives_way_in_whichever_component_it_is() -> None:
    engine = sharing(24, device_pages=12, device_window_pages=12)
    back_up(engine, 1, 2)
    engine.index.evict_device(12, 12)
    index = engine.index
    windows = index.table.swa_host.n_present
    assert windows > 0
    # prompts 1 and 2 are on the host alone; room for many pages takes both components'
    index.room.make(index.host, 18, Claim(1 << 62, math.inf))
    assert index.host.free_pages >= 18
    assert index.table.swa_host.n_present < windows
    engine.check()
    engine.check_every_slot()


def test_holes_become_room_before_anything_is_dropped() -> None:
    engine = sharing(400, device_pages=200, device_window_pages=200)
    back_up(engine, *range(40))
    index, windows = engine.index, engine.index.table.swa_host
    index.residency.forget_windows(np.flatnonzero(index.kept.ends)[::2])
    before = windows.n_present, index.host.free_pages
    # an extent holds up to two window pages, or at least two pages
    room = index.host_tier.shared.arena.holes(1) // 2 * 2
    assert room > 10
    index.room.make(index.host, before[1] + room, Claim(1 << 62, math.inf))
    assert index.host.free_pages >= before[1] + room
    assert windows.n_present == before[0]
    assert index.counters.moved_host_window_pages
    engine.check()
    engine.check_every_slot()


def test_what_a_load_reads_stays_where_it_is() -> None:
    engine = sharing(60, device_pages=24, device_window_pages=24)
    back_up(engine, *range(5))
    index, table = engine.index, engine.index.table
    index.evict_device(24, 24)
    for seed in (1, 3):
        rows = table.lookup(prompt(4, seed)[:-1].reshape(-1, 16), None)
        index.room.drop_tail(int(rows[-1]))
    engine.abort(started(engine, prompt(4, 2)))
    (load,) = index.pending[TransferKind.LOAD].values()
    moved = 0
    while index.room.vacate(index.host):
        moved += 1
        assert (table.host.slots[load.full.rows] == load.full.host).all()
    assert moved, "nothing moved at all"
    engine.check_every_slot()
    engine.settle()
    engine.check_idle()


def test_a_prefix_that_many_share_outlives_a_younger_conversation() -> None:
    """Who goes on from where others did is expected again; one conversation is not, however
    many turns it had."""
    engine = engine_with(
        device_pages=99, device_window_pages=99, host_pages=200, host_window_pages=99
    )
    shared, requests = prompt(4), range(1, 21)
    for seed in requests:
        tokens = join(shared, prompt(2, seed=seed))
        engine.finish(run(engine, tokens, chunk=2 * PAGE, settle=True))
        engine.settle()
    turns = [prompt(4, seed=50)]
    for seed in (51, 52, 53):
        serve_and_settle(engine, join(*turns))
        turns.append(prompt(2, seed=seed))
    engine.index.evict_device(ALL, ALL)
    index, conversation = engine.index, join(*turns[:-1])
    assert index.table.forks[rows_of(engine, shared)[-1]] == len(requests) - 1
    assert not index.table.forks[rows_of(engine, conversation)].any()
    assert len(find(engine, shared).rows) == 4
    while (end := next(index.room.tails(math.inf, [], []), None)) is not None:
        index.room.drop_tail(end)
        if len(find(engine, conversation).rows) == 0:
            break
    assert len(find(engine, shared).rows) == 4, "what all those requests shared went first"
    check_all(engine, idle=True)


def test_where_all_is_worth_more_nobody_asks_in_every_step() -> None:
    """A refused copy is not looked for again at once: that takes a pass over the table."""
    engine = engine_with(device_pages=40, device_window_pages=40, host_pages=20)
    index = engine.index
    serve_and_settle(engine, prompt(4))
    index.evict_device(ALL, ALL)
    index.ahead.note_room(index.room.make(index.host, ALL, Claim(age=0, worth=0.0)))
    assert len(find(engine, prompt(4)).rows) == 4
    looks = index.ahead.looks
    index.demote_ahead()
    assert index.ahead.looks == looks


def with_two_prompts(host_pages: int = 60) -> SimEngine:
    """12 and 14 pages on the device, none on the host; 14 of 40 are free, 20 are to be safe."""
    engine = engine_with(
        write=WritePolicy.WRITE_BACK,
        low_share=2,
        pinned_share=1,
        device_pages=40,
        device_window_pages=40,
        host_pages=host_pages,
        host_window_pages=60,
    )
    serve(engine, prompt(12, seed=1))
    serve(engine, prompt(14, seed=2))
    return engine


def test_what_leaves_soon_is_copied_with_the_rest_of_its_path() -> None:
    engine = with_two_prompts()
    engine.demote()
    backups = engine.index.pending[TransferKind.BACKUP].values()
    assert [len(backup.full) for backup in backups] == [12]


def test_a_look_at_what_leaves_next_serves_until_a_third_of_it_has_left() -> None:
    """A look and a backup take about as long for few pages as for many."""
    engine = with_two_prompts()
    ahead = engine.index.ahead
    engine.demote()
    engine.settle()
    assert ahead.looks == 1
    engine.demote()
    assert ahead.looks == 1, "what it found is on the host"
    serve(engine, prompt(12, seed=3))
    engine.demote()
    assert ahead.looks == 2


def test_a_look_is_taken_again_where_the_host_had_no_room() -> None:
    engine = with_two_prompts(host_pages=8)
    engine.demote()
    engine.settle()
    index = engine.index
    assert index.table.host.n_present < 12
    assert index.ahead.is_due(index.device_pool.free_pages(), index.device_pool.free_window_pages())


def test_room_causes_a_look_where_the_device_lost_copies_for_it() -> None:
    for on_device in (True, False):
        engine = engine_with()
        serve_and_settle(engine, prompt(4))
        index = engine.index
        if not on_device:
            index.evict_device(ALL, ALL)
        freed = index.room.make(index.host, ALL, NEEDED_NOW)
        assert index.table.host.n_present == 0
        assert freed.copies_of_device == on_device
        index.demote_ahead()
        index.ahead.note_room(freed)
        pool = index.device_pool
        assert not on_device or index.ahead.is_due(pool.free_pages(), pool.free_window_pages())


def test_a_prefix_that_somebody_goes_on_from_is_not_lost_with_its_window() -> None:
    """A prefetch holds what it continues while it makes room for itself; found by a seed."""
    engine = engine_with()
    tokens = prompt(6)
    serve_and_settle(engine, tokens)
    index, table = engine.index, engine.index.table
    index.evict_device(ALL, ALL)
    rows = rows_of(engine, tokens)
    held = Hold((table.host, rows[:2]), (table.swa_host, rows[:2]))
    index.room.make(index.host_window, ALL, NEEDED_NOW)
    assert (rows_of(engine, tokens)[:2] == rows[:2]).all()
    held.release()
    check_all(engine)
    index.room.make(index.host_window, ALL, NEEDED_NOW)
    assert table.n_rows == 0


@pytest.mark.parametrize(("alone", "left"), [(1, 0), (2, 4)])
def test_a_prefix_goes_with_its_end_unless_two_requests_used_it_without_the_end(
    alone: int, left: int
) -> None:
    """With a policy that ranks pages: a window that the one at the end makes up for goes before any
    end does, so what is ahead of it goes with the end, whatever its rank. Who uses it for itself
    twice makes it a place where prefixes part, and such a window is kept."""
    engine = engine_with(
        eviction="lfu",
        checkpoint_pages=9,
        device_pages=40,
        device_window_pages=40,
        host_pages=40,
        host_window_pages=40,
    )
    shared = prompt(4)
    serve_and_settle(engine, *[shared] * alone)
    serve_and_settle(engine, join(shared, prompt(2, seed=1)))
    index = engine.index
    rows = rows_of(engine, join(shared, prompt(2, seed=1)))
    assert index.table.hits[rows].tolist() == [alone + 1] * 4 + [1] * 2
    index.evict_device(ALL, ALL)
    index.room.make(index.host_window, ALL, Claim(age=1 << 62, worth=2 * MOST_USES))
    assert len(find(engine, shared).rows) == left
    check_all(engine, idle=True)
