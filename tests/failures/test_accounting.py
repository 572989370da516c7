"""Catalogue 2E: every slot belongs to exactly one owner."""

from typing import Any

import numpy as np
import pytest
import torch

from sglang_ext.adapter.device_pool import EngineDevicePool
from sglang_ext.core.plan import Declined, DeclineReason, TransferKind
from sglang_ext.core.table.columns import ABSENT, Rows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import (
    ALL,
    PAGE,
    Tokens,
    check_all,
    copies,
    engine_with,
    join,
    pages_of,
    prompt,
    rows_of,
    run,
    serve,
    serve_and_settle,
)


def engine_pool(page: int, pages: int) -> tuple[EngineDevicePool, Any]:
    """The adapter's pool over the engine's own allocator."""
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool

    class NoMemory(BaseSWAKVPool):
        def __init__(self) -> None:
            self.full_kv_pool = self.swa_kv_pool = None

        def register_mapping(self, full_to_swa_index_mapping: torch.Tensor) -> None:
            self.full_to_swa_index_mapping = full_to_swa_index_mapping

        def _unused(self, *args: Any) -> Any:
            raise NotImplementedError

        get_key_buffer = get_value_buffer = get_kv_buffer = set_kv_buffer = _unused
        get_state_buf_infos = translate_loc_from_full_to_swa = _unused

    geometry = Geometry(page, 32)
    tokens = pages * geometry.page_tokens
    allocator = SWATokenToKVPoolAllocator(
        tokens, tokens, page, torch.float32, "cpu", NoMemory(), need_sort=False
    )
    return EngineDevicePool(allocator, geometry), allocator


@pytest.mark.parametrize("page", [1, 16])
def test_a_page_without_a_peer_gives_back_no_sliding_window_slot(page: int) -> None:
    """E2: its entry in the engine's map reads as the padding slot 0."""
    pool, allocator = engine_pool(page, pages=4)
    full, swa = pool.allocate(3), pool.allocate_window(1)
    assert full is not None and swa is not None
    pool.bind_window(full[:1], swa)
    owned_full, owned_swa = pool.owned_slots(pool.row_tokens(full, swa), given_back=0)
    assert (owned_full == full).all()
    assert (owned_swa[:1] == swa).all() and (owned_swa[1:] == ABSENT).all()
    pool.release_window(full[:1], swa)
    pool.release(full)
    assert pool.free_pages() == pool.free_window_pages() == 4
    slots = 4 * 16 // page
    for part in (allocator.full_attn_allocator, allocator.swa_attn_allocator):
        part.merge_and_sort_free()
        assert sorted(part.free_pages.tolist()) == list(range(1, slots + 1))


def test_a_page_that_lost_half_of_its_peers_gives_back_the_others() -> None:
    """E1: with engine pages smaller than the table's, a window may end inside a page."""
    pool, allocator = engine_pool(page=1, pages=4)
    full, swa = pool.allocate(2), pool.allocate_window(2)
    assert full is not None and swa is not None
    pool.bind_window(full, swa)
    allocator.free_swa(torch.from_numpy(full[0, :5].astype(np.int64)))
    _, owned = pool.owned_slots(pool.row_tokens(full, swa), given_back=0)
    assert (owned[0] == ABSENT).all() and (owned[1] == swa[1]).all()
    assert pool.free_window_pages() == 3
    pool.release(full[:1])
    assert pool.free_pages() == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_eviction_credits_what_it_frees(order: tuple[int, int]) -> None:
    """E3: two prompts that share pages and end inside one: 64 and 640 tokens and some."""
    engine = SimEngine(Geometry(64, 128), Sizes(32, 32))
    base = np.arange(64 + 576 + 7)
    prompts = [base, np.concatenate((base[:64], base[::-1][:20]))]
    for number in order:
        engine.finish(run(engine, prompts[number], chunk=96))
    pool, total = engine.device, 0
    while True:
        free = pool.free_pages(), pool.free_window_pages()
        freed = engine.index.evict_device(1, 1)
        assert freed == (pool.free_pages() - free[0], pool.free_window_pages() - free[1])
        check_all(engine)
        total += freed[0]
        if freed == (0, 0):
            break
    assert total == 10 and pool.full.used == pool.window.used == 0


def test_windows_given_back_before_an_unfinished_insert_are_not_live() -> None:
    """E5: conservation holds while the request runs, and at idle."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=24)
    tokens = prompt(12)
    request = engine.start(tokens)
    engine.compute(request, 10 * PAGE)  # one chunk, much longer than the window
    rows = rows_of(engine, tokens)
    live = copies(engine)["swa_device"].present[rows]
    assert live.tolist() == [False] * 7 + [True] * 3
    assert engine.device.window.used == 3
    check_all(engine)
    engine.compute(request, ALL)
    engine.finish(request)
    check_all(engine, idle=True)
    assert engine.index.evict_device(ALL, ALL)[0] == 12
    assert engine.device.full.used == engine.device.window.used == 0


@pytest.mark.parametrize("in_flight", ["nothing", "backup", "abandoned backup", "load"])
def test_a_flush_gives_every_host_slot_back_once(in_flight: str) -> None:
    """E6, E7: whatever is in flight, and the tier works again."""
    engine = engine_with()
    tokens = prompt(6)
    serve(engine, tokens)
    if in_flight == "abandoned backup":
        engine.index.evict_device(ALL, ALL, abandon_backups=True)
    elif in_flight != "backup":
        engine.settle()
    if in_flight == "load":
        engine.index.evict_device(ALL, ALL)
        engine.abort(engine.start(tokens))
    assert any(engine.index.pending.values()) == (in_flight != "nothing")
    engine.reset()
    for slots in (engine.host, engine.host_window, engine.device.full, engine.device.window):
        assert sorted(slots.free) == list(range(slots.total))
    serve_and_settle(engine, tokens)
    engine.index.evict_device(ALL, ALL)
    engine.finish(run(engine, tokens, settle=True))
    assert engine.index.counters.loaded_pages == 6
    check_all(engine, idle=True)


def test_the_table_and_its_transfers_own_their_slots() -> None:
    """E8: nobody else's array stands in the table, and no view of it leaves."""
    engine = engine_with()
    full, swa = engine.device.allocate(6), engine.device.allocate_window(6)
    assert full is not None and swa is not None
    engine.device.bind_window(full, swa)
    rows = engine.index.insert(pages_of(prompt(6)), None, 0, full, swa, 0)
    backup: Any = engine.index.begin_backup(rows)
    columns = copies(engine)
    device, host, windows = (columns[name].slots for name in ("device", "host", "swa_device"))
    assert rows.tolist() == list(range(6))
    taken = columns["swa_device"].take(np.arange(6))
    outside = [full, swa, backup.full.device, backup.full.host, backup.window.device, taken]
    for inside in (device, host, windows):
        assert not any(np.shares_memory(inside, array) for array in outside)
    assert (taken == swa).all()


@pytest.mark.parametrize("page", [1, 16])
def test_slots_from_the_engine_are_no_view_of_its_free_list(page: int) -> None:
    """E8, at the border."""
    pool, allocator = engine_pool(page, pages=4)
    full = pool.allocate(2)
    assert full is not None
    before = full.copy()
    allocator.full_attn_allocator.free_pages.zero_()
    assert (full == before).all()


@pytest.mark.parametrize("wanted", [(0, 3), (2, 3), (3, 0)])
def test_one_call_frees_both_components(wanted: tuple[int, int]) -> None:
    """E9: the shortfall of each is named, also when only windows are short."""
    engine = engine_with(host_pages=0, device_pages=24, device_window_pages=8)
    for seed in range(2):
        engine.finish(run(engine, prompt(4, seed), chunk=PAGE))
    free = engine.device.free_pages(), engine.device.free_window_pages()
    freed = engine.index.evict_device(*wanted)
    assert freed[0] >= wanted[0] and freed[1] >= wanted[1]
    assert engine.device.free_pages() == free[0] + freed[0]
    assert engine.device.free_window_pages() == free[1] + freed[1]
    assert freed[0] == wanted[0], "more pages than asked for went with the windows"
    check_all(engine, idle=True)


def _declined(rows: Rows) -> Declined:
    return Declined(DeclineReason.DEVICE_FULL)


def _recompute_host_only_pages(engine: SimEngine, tokens: Tokens) -> None:
    """The pages are on the host alone, and a load is declined: a request computes them."""
    serve_and_settle(engine, tokens)
    engine.index.evict_device(ALL, ALL)
    begin, engine.index.begin_load = engine.index.begin_load, _declined  # type: ignore[method-assign]
    engine.finish(run(engine, join(tokens, prompt(1, seed=1))))
    engine.index.begin_load = begin  # type: ignore[method-assign]


def test_slots_that_revive_a_host_page_are_not_free() -> None:
    """E10: the request's own slots become the page's, and are not given back too."""
    engine = engine_with()
    tokens = prompt(6)
    _recompute_host_only_pages(engine, tokens)
    rows, device = rows_of(engine, tokens), engine.device
    for name, slots in (("device", device.full), ("swa_device", device.window)):
        column = copies(engine)[name]
        held = column.slots[rows[column.present[rows]]].ravel().tolist()
        assert held and not set(held) & set(slots.free)
    assert copies(engine)["device"].present[rows].all()
    assert engine.index.pending[TransferKind.BACKUP], "the new page goes to the host"
    check_all(engine, idle=True)
