"""Catalogue 2C: the life of a load."""

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.device.look_ahead import STEPS_AFTER_A_FAILURE
from sglang_ext.core.plan import Declined, DeclineReason, Transfer, TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import (
    ALL,
    PAGE,
    ROOMY,
    Tokens,
    check_all,
    engine_with,
    find,
    prompt,
    rows_of,
    run,
    serve,
    serve_and_settle,
)


def test_room_for_a_load_is_not_made_on_the_host_it_reads() -> None:
    """C1: the device is full of pages without a copy, and the host has no room for them."""
    engine = engine_with(
        write=WritePolicy.WRITE_BACK, low_share=1, host_pages=5, host_window_pages=2
    )
    tokens = prompt(5)
    serve(engine, tokens)
    engine.demote()
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    for seed in (1, 2):
        serve(engine, prompt(5, seed))
    request = engine.start(tokens)
    assert request.protected == 5
    check_all(engine)
    engine.compute(request, 1)
    engine.finish(request)
    assert engine.index.counters.dropped_pages >= 3
    assert engine.index.counters.evicted_host_pages == 0
    check_all(engine, idle=True)


def test_copies_of_one_sweep_do_not_take_each_others_host_pages() -> None:
    """C2: three prompts leave the device, the host has room for less, acks come late."""
    engine = engine_with(write=WritePolicy.WRITE_BACK, low_share=1, pinned_share=1, host_pages=5)
    prompts = [prompt(2, seed) for seed in range(3)]
    for tokens in prompts:
        serve(engine, tokens)
    engine.demote()
    begun = list(engine.index.pending[TransferKind.BACKUP].values())
    assert len(begun) >= 2
    slots = np.concatenate([t.full.host for t in begun]).ravel().tolist()
    assert len(set(slots)) == len(slots) <= 5
    for _ in begun:
        engine.copy(TransferKind.BACKUP)
    while engine.index.pending[TransferKind.BACKUP]:
        engine.commit(TransferKind.BACKUP)
        check_all(engine)
    engine.index.evict_device(ALL, ALL)
    check_all(engine, idle=True)


def test_a_host_page_keeps_its_contents_until_a_slow_load_has_read_it() -> None:
    """C3: other pages want its slots while the copy waits."""
    sizes = {"device_pages": 24, "device_window_pages": 24, "host_pages": 10}
    engine = engine_with(write=WritePolicy.WRITE_BACK, low_share=1, pinned_share=1, **sizes)
    tokens = prompt(6)
    engine.finish(run(engine, tokens))
    engine.demote()
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    for seed in (1, 2):
        serve(engine, prompt(4, seed))
    request = engine.start(tokens)
    assert engine.index.pending[TransferKind.LOAD]
    engine.press_host(pages=ALL, windows=ALL)
    for _ in range(STEPS_AFTER_A_FAILURE):
        engine.demote()
    while engine.index.pending[TransferKind.BACKUP]:
        engine.copy(TransferKind.BACKUP)
        engine.commit(TransferKind.BACKUP)
    assert engine.index.counters.backed_up_pages > 6
    engine.compute(request, 1)  # only now is the load made
    engine.finish(request)
    check_all(engine, idle=True)


def _on_host(tokens: Tokens, **sizes: Any) -> SimEngine:
    engine = engine_with(**sizes)
    serve_and_settle(engine, tokens)
    engine.index.evict_device(ALL, ALL)
    return engine


@pytest.mark.parametrize("abort", ["device full", "window full", "allocation", "stale"])
def test_a_load_that_does_not_begin_leaves_no_trace(abort: str) -> None:
    """C4: whatever stops it, nothing is locked, published or lost."""
    tokens = prompt(5)
    engine = _on_host(tokens, device_pages=24, device_window_pages=24)
    rows, reason = find(engine, tokens).rows, DeclineReason.DEVICE_FULL
    if abort == "device full":
        assert engine.device.allocate(20) is not None
    elif abort == "window full":
        assert engine.device.allocate_window(23) is not None
    elif abort == "allocation":
        engine.device.window.allocations_to_fail = 1
    else:
        engine.index.residency.forget_windows(rows[-1:])
        reason = DeclineReason.STALE
    before = engine.fingerprint(), engine.device.full.used, engine.device.window.used
    assert engine.index.begin_load(rows) == Declined(reason)
    after = engine.fingerprint(), engine.device.full.used, engine.device.window.used
    assert before == after
    assert not engine.index.pending[TransferKind.LOAD]


@pytest.mark.parametrize("free", [1, 2])
def test_admission_is_told_every_window_page_that_a_load_pins(free: int) -> None:
    """C5: with a page less than that the request goes without the load."""
    tokens = prompt(6)
    engine = _on_host(tokens, device_pages=24, device_window_pages=8)
    assert engine.device.allocate_window(8 - free) is not None
    match = find(engine, tokens)
    assert match.window_pages_to_pin == 2
    plan = engine.index.begin_load(match.rows)
    if free < 2:
        assert plan == Declined(DeclineReason.DEVICE_FULL)
        assert engine.device.free_window_pages() == free
    else:
        assert isinstance(plan, Transfer)
        assert engine.device.free_window_pages() == 0


def test_admission_is_told_of_evictable_window_pages_that_a_load_locks() -> None:
    """C5: half of the window is on the device, and stops being evictable."""
    tokens = prompt(6)
    engine = engine_with()
    serve_and_settle(engine, tokens)
    engine.index.residency.drop_device_windows(rows_of(engine, tokens)[-1:])
    column = engine.index.table.swa_device
    match = find(engine, tokens)
    before = engine.device.free_window_pages() + column.n_evictable
    assert isinstance(engine.index.begin_load(match.rows), Transfer)
    after = engine.device.free_window_pages() + column.n_evictable
    assert before - after == match.window_pages_to_pin == 2


def test_a_long_prefix_loads_into_a_window_pool_of_two_windows() -> None:
    """C6: a load needs one window, however long the prefix is."""
    engine = SimEngine(Geometry(PAGE, 32), Sizes(202, 4, 240, 240))
    tokens = prompt(200)
    engine.finish(run(engine, tokens, chunk=PAGE, settle=True))
    engine.index.evict_device(ALL, ALL)
    request = engine.start(tokens)
    assert request.protected == 200
    engine.compute(request, 1)
    engine.finish(request)
    engine.settle()
    assert engine.index.counters.loaded_window_pages == 2
    check_all(engine, idle=True)


def test_a_load_evicts_windows_that_stand_in_its_way() -> None:
    """C7."""
    tokens = prompt(6)
    engine = _on_host(tokens, device_pages=24, device_window_pages=8)
    engine.finish(run(engine, prompt(8, seed=1), chunk=PAGE, settle=True))
    assert engine.device.free_window_pages() < 2 <= engine.index.table.swa_device.n_evictable
    engine.finish(run(engine, tokens, settle=True))
    assert engine.index.counters.loaded_window_pages == 2
    check_all(engine, idle=True)


def test_the_engine_is_told_of_device_pages_only_as_device_prefix() -> None:
    """C8: a prefix that is half on the host, half on the device."""
    engine = engine_with(checkpoint_pages=2)
    tokens = prompt(6)
    request = engine.start(tokens, namespace=(None, None))
    while not request.done:
        engine.compute(request, 2 * PAGE)
        engine.settle()
    engine.finish(request)
    assert engine.index.evict_device(2, 0) == (2, 2)
    params = SimpleNamespace(
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        page_size=1,
        draft_swa_window=0,
    )
    cache: Any = SwaHiCache(params, engine.index, engine.device, ROOMY)  # type: ignore[arg-type]
    key = RadixKey(array("q", tokens[:-1].tobytes()))
    result = cache.match_prefix(MatchPrefixParams(key=key))
    assert result.device_prefix_len == 4 * PAGE
    assert result.host_hit_length == result.swa_host_hit_length == 2 * PAGE
    assert len(result.last_device_node.rows) == 4
    assert engine.index.table.device.present[result.last_device_node.rows].all()
    assert len(result.best_match_node.rows) == 6
