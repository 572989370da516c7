"""Catalogue 2B: lost windows, victims, and what used to be splits."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from sglang_ext.core.host.room import Claim
from sglang_ext.core.plan import Declined, DeclineReason, Transfer
from sglang_ext.core.table.columns import ABSENT, Rows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import (
    ALL,
    PAGE,
    check_all,
    copies,
    engine_with,
    find,
    join,
    pages_of,
    prompt,
    rows_of,
    run,
    serve,
    serve_and_settle,
)

NOTHING_IS_YOUNGER = Claim(age=1 << 62, worth=math.inf)
"""Host eviction for such a page takes no copy of a page that is on the device."""


def test_page_in_device_and_host_lru() -> None:
    """B1: a page that came back to the device is no victim of the host's queue, though
    it stood there; once it has left the device again, it is."""
    engine = engine_with(device_pages=16, device_window_pages=16)
    index, first, second = engine.index, prompt(4, seed=1), prompt(4, seed=2)
    for tokens in (first, second):
        engine.finish(run(engine, tokens, chunk=PAGE, settle=True))
    index.evict_device(ALL, ALL)
    engine.finish(run(engine, second, settle=True))
    rows, column = rows_of(engine, second), copies(engine)
    index.room.make(index.host, ALL, NOTHING_IS_YOUNGER)
    index.room.make(index.host_window, ALL, NOTHING_IS_YOUNGER)
    check_all(engine)
    assert len(rows_of(engine, first)) == 0, "pages on the host alone are victims"
    assert column["host"].ready[rows].all(), "a page of the device was a victim on the host"
    assert column["swa_host"].ready[rows[-2:]].all()
    index.evict_device(ALL, ALL)
    index.room.make(index.host, ALL, NOTHING_IS_YOUNGER)
    assert index.table.n_rows == 0, "a page left the device, and the host did not notice"
    check_all(engine, idle=True)


def test_protected_length_after_rematch() -> None:
    """B2: chunks of a prompt whose stored windows are gone. The follow-up of an insert
    finds pages by their tokens, so it never covers less than the request has."""
    engine = engine_with(device_pages=24, device_window_pages=8, host_pages=0)
    tokens = prompt(10)
    engine.finish(run(engine, tokens, chunk=2 * PAGE))
    engine.index.evict_device(0, ALL)
    assert len(find(engine, tokens).rows) == 0, "the window is still there"
    request = engine.start(join(tokens, prompt(2, seed=1)))
    while not request.done:
        engine.compute(request, 2 * PAGE)
        engine.index.evict_device(0, ALL)
        assert request.protected == request.computed // PAGE
        check_all(engine)
    engine.finish(request)
    check_all(engine, idle=True)


def test_a_chunk_longer_than_the_window_is_a_full_host_hit() -> None:
    """B3: the chunk's first windows were given back before its pages were inserted."""
    engine = engine_with(device_pages=16, device_window_pages=16)
    tokens = prompt(10)
    request = engine.start(tokens)
    engine.compute(request, len(tokens))
    rows = rows_of(engine, tokens)
    assert not engine.index.table.swa_device.present[rows[:5]].any()
    engine.finish(request)
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    match = find(engine, tokens)
    assert (len(match.rows), match.device_pages) == (10, 0)
    engine.finish(run(engine, tokens, settle=True))
    assert engine.index.counters.loaded_pages == 10


def _scattered(on_device: int, windows: Sequence[bool], kept: Sequence[bool]) -> SimEngine:
    """Four pages: ``on_device`` of them on the device; which of them have their window there,
    and after which of them a window ends that the host keeps."""
    engine = engine_with(checkpoint_pages=1)
    tokens = prompt(4)
    engine.finish(run(engine, tokens, chunk=PAGE, settle=True))
    rows, index = rows_of(engine, tokens), engine.index
    assert all(column.ready[rows].all() for column in copies(engine).values())
    index.residency.forget_windows(rows[~np.array(kept)])
    index.evict_device(4 - on_device, 0)
    rows = rows_of(engine, tokens)
    held = index.table.swa_device.present[rows]
    index.residency.drop_device_windows(rows[~np.array(windows)[: len(rows)] & held])
    return engine


def test_every_boundary_that_matches_can_be_restored() -> None:
    """B4: every place of every page of the last windows."""
    tokens = prompt(4)
    loads = 0
    for on_device in range(5):
        for places in itertools.product((False, True), repeat=8):
            windows, kept = places[:4], places[4:]
            if any(windows[on_device:]):
                continue  # a window cannot be where its page is not
            engine = _scattered(on_device, windows, kept)
            match = find(engine, tokens)
            request = engine.start(tokens)
            assert request.protected == len(match.rows), (on_device, windows, kept)
            loads += len(match.rows) > match.device_pages
            engine.compute(request, 1)  # reads the whole window
            engine.finish(request)
            check_all(engine, idle=True)
    assert loads > 50


def test_pages_whose_windows_have_all_moved_on_are_still_cached() -> None:
    """B5: a missing window does not keep a page out."""
    engine = engine_with(host_pages=0)
    tokens = prompt(3)
    full = engine.device.allocate(3)
    assert full is not None
    none = np.full((3, 1), ABSENT, dtype=np.int32)
    rows = engine.index.insert(pages_of(tokens), None, 0, full, none, 0)
    assert engine.index.table.device.ready[rows].all() and len(rows) == 3
    assert not engine.index.table.swa_device.present[rows].any()
    assert len(find(engine, tokens).rows) == 0
    engine.check()
    assert engine.index.evict_device(ALL, ALL) == (3, 0)


def test_a_window_is_revived_under_the_pages_of_a_running_request() -> None:
    """B6: the pages keep their slots, only the missing peer is taken over."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    tokens = prompt(6)
    serve(engine, tokens)
    rows, table = rows_of(engine, tokens), engine.index.table
    engine.index.evict_device(0, ALL)
    lock, before = engine.index.hold(rows), table.device.slots[rows].copy()
    serve(engine, tokens)
    assert (table.device.slots[rows] == before).all(), "slots of a locked page were replaced"
    assert table.swa_device.present[rows[4:]].all()
    for row in rows[4:].tolist():
        full, swa = table.device.slots[row, 0], table.swa_device.slots[row, 0]
        assert engine.device.peer[int(full)] == int(swa)
    engine.check_every_slot()
    lock.release()
    check_all(engine, idle=True)


@pytest.mark.parametrize("page", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("window", [4, 64, 128, 1024])
def test_the_last_page_has_its_window_in_every_geometry(page: int, window: int) -> None:
    """B7: also where a page is larger than the window."""
    geometry = Geometry(page, window)
    size, count = geometry.page_tokens, geometry.window_pages + 3
    room = 2 * count + 2
    engine = SimEngine(geometry, Sizes(room, room, room, room, low_share=1000))
    tokens = np.random.default_rng(page).integers(0, 99, count * size + 1)
    request = engine.start(tokens)
    engine.compute(request, (count - 1) * size)
    for step in (size // 2, size - size // 2, 1):
        engine.compute(request, step)
        engine.settle()
        last = rows_of(engine, tokens[: request.computed + 1])[-1]
        assert engine.index.table.swa_device.ready[last]
    engine.finish(request)
    engine.settle()
    assert find(engine, tokens).device_pages == count
    engine.index.evict_device(ALL, ALL)
    assert len(find(engine, tokens).rows) == count
    engine.finish(run(engine, tokens))
    check_all(engine, idle=True)


def test_pages_without_a_window_are_victims_in_their_turn_and_revived_by_use() -> None:
    """B8: they are neither kept for ever nor stored twice."""
    engine = engine_with(host_pages=0, device_pages=16, device_window_pages=16)
    dead, alive = prompt(4, seed=1), prompt(4, seed=2)
    serve(engine, dead)
    serve(engine, alive)
    engine.index.residency.drop_device_windows(rows_of(engine, dead)[2:])
    assert len(find(engine, dead).rows) == 0
    assert engine.index.evict_device(2, 0) == (2, 0)
    assert len(find(engine, alive).rows) == 4, "a useless page outlived a useful one"
    serve(engine, dead)
    assert len(find(engine, dead).rows) == 4
    assert engine.device.full.used == 8
    check_all(engine, idle=True)


def test_use_of_a_long_prefix_refreshes_one_window() -> None:
    """B9."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    old, other = prompt(8, seed=1), prompt(2, seed=2)
    engine.finish(run(engine, old, chunk=2 * PAGE))
    serve(engine, other)
    rows = rows_of(engine, old)
    before = engine.index.table.swa_age[rows].copy()
    for _ in range(3):
        engine.index.residency.use(find(engine, old).rows)
    changed = engine.index.table.swa_age[rows] != before
    assert changed.tolist() == [False] * 6 + [True] * 2
    engine.index.evict_device(0, engine.index.table.swa_device.n_evictable - 2)
    assert engine.index.table.swa_device.present[rows].tolist() == changed.tolist()


@pytest.mark.parametrize("host_pages", [0, 24])
def test_a_parked_branch_keeps_the_window_it_will_resume_from(host_pages: int) -> None:
    """B10: younger windows that nobody has resumed from go first."""
    engine = engine_with(device_pages=48, device_window_pages=16, host_pages=host_pages)
    engine._slide = lambda request: None  # type: ignore[method-assign]  # as in a real prefill
    parked = prompt(6, seed=1)
    serve_and_settle(engine, parked)
    engine.index.residency.drop_device_windows(rows_of(engine, parked)[:4])
    serve_and_settle(engine, prompt(8, seed=2))  # younger, with windows in its middle
    column = copies(engine)["swa_device"]
    assert (engine.device.free_window_pages(), column.n_evictable) == (6, 2 + 8)
    pressure = run(engine, prompt(11, seed=3))  # its last token is on a twelfth page
    match = find(engine, parked)
    assert len(match.rows) == match.device_pages == 6
    engine.finish(pressure)
    check_all(engine, idle=True)


def test_the_newest_window_of_a_conversation_replaces_its_older_ones() -> None:
    """B10 on the host: a pool that is full of earlier turns of the same conversation."""
    room = {"device_pages": 24, "device_window_pages": 24, "host_window_pages": 4}
    engine = engine_with(**room, low_share=1, checkpoint_pages=99)
    tokens = prompt(4)
    for turn in range(3):
        engine.finish(run(engine, tokens))
        engine.settle()
        engine.demote()
        engine.settle()
        engine.index.evict_device(ALL, ALL)
        assert len(find(engine, tokens).rows) == len(pages_of(tokens)), f"turn {turn} is lost"
        tokens = join(tokens, prompt(4, seed=turn + 1))
    check_all(engine, idle=True)


def test_a_parked_conversation_outlives_windows_inside_others() -> None:
    """B10 on the host: windows between which nobody computes much again go first."""
    engine = engine_with(
        device_pages=40,
        device_window_pages=40,
        host_pages=60,
        host_window_pages=10,
        low_share=1,
        checkpoint_pages=99,
    )
    parked = prompt(4, seed=9)
    serve_and_settle(engine, parked)
    turns = [prompt(3, seed=0)]
    for turn in range(1, 4):  # a window at the end of each turn is copied at once
        serve_and_settle(engine, join(*turns))
        turns.append(prompt(3, seed=turn))
    column, kept = copies(engine)["swa_host"], engine.index.kept
    assert column.n_present == 4 * 2 and kept.ends.sum() == 4
    engine.index.evict_device(ALL, ALL)
    engine.index.room.make(engine.index.host_window, 6, NOTHING_IS_YOUNGER)
    assert kept.ends.sum() == 2, "both turns before the last one"
    assert len(find(engine, parked).rows) == 4
    assert len(find(engine, join(*turns)).rows) == 9
    check_all(engine, idle=True)


def test_write_back_keeps_a_window_inside_a_longer_prefix() -> None:
    """B11: an earlier conversation ended there; only windows are short of room."""
    engine = engine_with(
        write=WritePolicy.WRITE_BACK,
        device_window_pages=24,
        checkpoint_pages=4,
        low_pages=0,
        low_window_pages=24,
    )
    short = prompt(4)
    serve(engine, short)
    serve(engine, join(short, prompt(4, seed=1)))
    engine.demote()
    engine.settle()
    assert not copies(engine)["host"].present.any()
    engine.index.evict_device(0, ALL)
    assert copies(engine)["swa_device"].n_present == 0
    match = find(engine, short)
    assert (len(match.rows), match.device_pages) == (4, 0)
    engine.finish(run(engine, short, settle=True))
    assert engine.index.counters.loaded_window_pages == 2
    check_all(engine, idle=True)


def test_a_full_and_locked_host_does_not_stop_eviction_of_windows() -> None:
    """B12: what cannot be saved is dropped, and counted."""
    engine = engine_with(
        write=WritePolicy.WRITE_BACK, low_share=1, host_pages=4, host_window_pages=2
    )
    serve(engine, prompt(4))
    engine.demote()
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    loading = engine.start(prompt(4))  # holds every host page until its load has ended
    serve(engine, prompt(4, seed=1))
    engine.demote()
    assert engine.index.counters.declined[DeclineReason.HOST_WINDOW_FULL] > 0
    dropped = engine.index.counters.dropped_window_pages
    evictable = engine.index.table.swa_device.n_evictable
    assert engine.index.evict_device(0, ALL) == (0, evictable) and evictable >= 2
    assert engine.index.counters.dropped_window_pages == dropped + evictable
    engine.compute(loading, 1)
    engine.finish(loading)
    check_all(engine, idle=True)


def test_a_page_released_after_the_pass_goes_before_younger_ones() -> None:
    """The queue sorted its victims while the oldest pages were locked."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    prompts = [prompt(3, seed) for seed in range(4)]
    for tokens in prompts:
        serve(engine, tokens)
    rows: list[Rows] = [rows_of(engine, tokens) for tokens in prompts]
    lock = engine.index.hold(rows[0])
    assert engine.index.evict_device(1, 0) == (1, 1)  # the pass; rows[1] loses its last page
    assert not engine.index.table.device.present[rows[1][2]]
    lock.release()
    engine.index.evict_device(3, 0)
    present = [engine.index.table.device.present[path].sum() for path in rows]
    assert present == [0, 2, 3, 3], "a page released late was passed over"
    check_all(engine, idle=True)


def test_declined_and_begun_are_the_only_answers_of_a_load() -> None:
    """B4, the other side: a boundary that was lost between match and load is declined."""
    engine = _scattered(2, (False,) * 4, (True,) * 4)
    match = find(engine, prompt(4))
    engine.index.room.drop_tail(int(match.rows[-1]))
    assert engine.index.begin_load(match.rows) == Declined(DeclineReason.STALE)
    again = find(engine, prompt(4))
    assert isinstance(engine.index.begin_load(again.rows), Transfer) and len(again.rows) == 3
    check_all(engine)
