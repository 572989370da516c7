"""Catalogue 2A: lock accounting."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams

from sglang_ext.adapter.handles import Prefix
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.plan import Transfer, TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import DeviceFullError
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import (
    ALL,
    PAGE,
    ROOMY,
    check_all,
    engine_with,
    find,
    join,
    prompt,
    rows_of,
    run,
    serve,
    serve_and_settle,
)


@pytest.mark.parametrize("write", WritePolicy)
def test_cascade_evict_with_a_lock_held(write: WritePolicy) -> None:
    """A1: windows inside a locked path are gone, and everything evictable is asked for."""
    engine = engine_with(device_pages=24, device_window_pages=24, write=write)
    shared = prompt(4)
    request = run(engine, join(shared, prompt(2, seed=1)), chunk=2 * PAGE)
    serve(engine, join(shared, prompt(3, seed=2)))  # an unlocked branch below a locked page
    rows = rows_of(engine, request.tokens)
    engine.index.evict_device(0, ALL)
    engine.index.evict_device(ALL, ALL, abandon_backups=True)
    table = engine.index.table
    assert table.device.present[rows].all(), "a locked page was evicted"
    assert table.swa_device.present[rows].tolist() == [False] * 4 + [True] * 2
    assert table.n_rows == 6 or write is not WritePolicy.WRITE_BACK
    check_all(engine)
    request.tokens = np.concatenate((request.tokens, prompt(2, seed=3)))
    engine.compute(request, ALL)  # reads what it holds
    engine.finish(request)
    check_all(engine, idle=True)


def test_release_of_a_lock_taken_before_a_window_came_back() -> None:
    """A2: the lock covers the window from the start, so a later holder keeps its own."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    tokens = prompt(6)
    serve(engine, tokens)
    engine.index.evict_device(0, ALL)
    early = engine.index.hold(rows_of(engine, tokens))
    request = run(engine, tokens)  # computes everything again, and revives the window
    rows = rows_of(engine, tokens)
    assert engine.index.table.swa_device.locks[rows].tolist() == [0, 0, 0, 0, 2, 2]
    early.release()
    assert engine.index.table.swa_device.locks[rows].tolist() == [0, 0, 0, 0, 1, 1]
    engine.index.evict_device(ALL, ALL)
    check_all(engine)
    engine.finish(request)
    check_all(engine, idle=True)


def test_a_lock_that_moves_on_leaves_the_other_holder_of_its_window() -> None:
    """A3: the early holder goes on to a deeper page, which gives its old window back."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    short = prompt(6)
    serve(engine, join(short, prompt(4, seed=1)))
    engine.index.evict_device(0, ALL)
    rows = rows_of(engine, join(short, prompt(4, seed=1)))
    moving = engine.index.hold(rows[:6])
    request = run(engine, short)
    deeper = engine.index.hold(rows)
    moving.release()
    assert engine.index.table.swa_device.locks[rows].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    deeper.release()
    engine.index.evict_device(ALL, ALL)
    check_all(engine)
    engine.finish(request)
    check_all(engine, idle=True)


def test_a_release_without_its_receipt_raises() -> None:
    """A5: nothing is walked to find out what a lock covers."""
    engine = engine_with(host_pages=0)
    tokens = prompt(4)
    serve(engine, tokens)
    params = SimpleNamespace(
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        page_size=PAGE,
        draft_swa_window=0,
    )
    cache: Any = SwaHiCache(params, engine.index, engine.device, ROOMY)
    rows = rows_of(engine, tokens)
    node = Prefix(rows, int(engine.index.table.generation[rows[-1]]))
    receipt = cache.inc_lock_ref(node)
    for unnamed in (None, DecLockRefParams()):
        with pytest.raises(AssertionError, match="without a receipt"):
            cache.dec_lock_ref(node, unnamed)
    assert (engine.index.table.device.locks[rows] == 1).all()
    cache.dec_lock_ref(node, DecLockRefParams(node_id=receipt.node_id))
    with pytest.raises(KeyError):
        cache.dec_lock_ref(node, DecLockRefParams(node_id=receipt.node_id))
    check_all(engine, idle=True)


def test_a_long_decode_gives_back_windows_behind_it_and_keeps_full_attention() -> None:
    """A6."""
    engine = engine_with(host_pages=0)
    tokens = prompt(8)
    request = engine.start(tokens)
    engine.compute(request, 4 * PAGE)
    rows = rows_of(engine, tokens)
    assert engine.index.table.swa_device.locks[rows].tolist() == [0, 0, 1, 1]
    for _ in range(engine.geometry.window + PAGE):
        engine.compute(request, 1)
    locks = engine.index.table.swa_device.locks[rows]
    assert not locks.any()
    assert (engine.index.table.device.locks[rows] == 1).all()
    assert engine.index.evict_device(0, 2)[1] == 2
    check_all(engine)
    engine.finish(request)


@pytest.mark.parametrize("flush", [False, True])
def test_branches_inside_a_prefix_that_is_loaded_leave_no_host_lock(flush: bool) -> None:
    """A7, A8: where a node would be split twice, by insert and by match, rows stay."""
    engine = engine_with(device_pages=32, device_window_pages=32)
    tokens = prompt(8)
    serve_and_settle(engine, tokens)
    engine.index.evict_device(ALL, ALL)
    loading = engine.start(tokens)
    rows = rows_of(engine, tokens)
    assert (engine.index.table.host.locks[rows] == 1).all()
    assert engine.index.table.swa_host.locks[rows].tolist() == [0] * 6 + [1] * 2
    for cut in (7, 3):
        request = run(engine, join(tokens[: cut * PAGE + 1], prompt(2, seed=cut)))
        find(engine, tokens[: cut * PAGE + 5])
        engine.finish(request)
        check_all(engine)
    engine.abort(loading)
    if flush:
        engine.reset()
        assert engine.host.free_pages() == 24 and engine.host_window.free_pages() == 12
    check_all(engine, idle=True)
    engine.index.evict_device(ALL, ALL)
    engine.press_host(pages=ALL)
    assert engine.host.used == 0, "a host page stayed locked"


@pytest.mark.parametrize("page", [1, 16, 64])
def test_a_lock_at_the_end_of_a_long_prompt_pins_one_window(page: int) -> None:
    """A9."""
    geometry = Geometry(page, 128)
    pages = 2048 // geometry.page_tokens
    engine = SimEngine(geometry, Sizes(device_pages=pages + 2, device_window_pages=pages + 2))
    request = engine.start(np.arange(2049))
    engine.compute(request, 2048)
    pinned = engine.index.table.swa_device.n_locked * geometry.page_tokens
    assert 128 <= pinned <= 128 + geometry.page_tokens
    assert engine.index.table.device.n_locked == pages


@pytest.mark.parametrize("first", [0, 1])
def test_two_loads_that_overlap_both_end(first: int) -> None:
    """A10: one load brings the pages, the other needs but a window inside them."""
    engine = engine_with(device_pages=24, device_window_pages=24)
    shared, rest = prompt(4), prompt(4, seed=1)
    serve_and_settle(engine, shared, join(shared, rest))
    engine.index.evict_device(ALL, ALL)
    requests = [
        engine.start(join(shared, rest)),
        engine.start(join(shared, prompt(2, seed=2))),
    ]
    loads = list(engine.index.pending[TransferKind.LOAD].values())
    assert [(len(t.full), len(t.window)) for t in loads] == [(8, 2), (0, 2)]
    assert isinstance(loads[1], Transfer)
    check_all(engine)
    for request in (requests[first], requests[1 - first]):
        engine.compute(request, ALL)  # each waits for its own copies, and reads them
        engine.commit(TransferKind.LOAD)
        engine.finish(request)
        check_all(engine)
    check_all(engine, idle=True)


def test_caching_allocates_nothing_when_every_slot_is_pinned() -> None:
    """A11: the device is full of running requests, the host is full of backups."""
    engine = engine_with(device_pages=12, host_pages=4, host_window_pages=2)
    requests = [engine.start(prompt(5, seed)) for seed in (1, 2)]
    for request in requests:
        engine.compute(request, ALL)
    assert engine.device.full.free_pages() == 0
    assert engine.index.table.device.n_evictable == 0
    third = engine.start(prompt(2, seed=3))
    with pytest.raises(DeviceFullError):
        engine.compute(third, ALL)
    check_all(engine)
    engine.abort(third)
    for request in requests:
        engine.finish(request)
    check_all(engine, idle=True)
