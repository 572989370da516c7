"""Slots of a model whose every layer has a sliding window."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.allocator.swa import PureSWATokenToKVPoolAllocator
from sglang.srt.mem_cache.swa_memory_pool import BaseSWAKVPool

from sglang_ext.adapter import factory
from sglang_ext.adapter.window_only import WindowOnlyDevicePool
from sglang_ext.core.table.columns import ABSENT
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError

PAGES = 4


def unused(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("not a part of this test")


class NoMemory(BaseSWAKVPool):
    """A KV pool without KV."""

    swa_kv_pool = None

    def __init__(self) -> None:
        pass

    def register_mapping(self, full_to_swa_index_mapping: torch.Tensor) -> None:
        pass

    get_key_buffer = get_value_buffer = get_kv_buffer = set_kv_buffer = unused
    get_state_buf_infos = translate_loc_from_full_to_swa = unused


def device_pool() -> tuple[WindowOnlyDevicePool, PureSWATokenToKVPoolAllocator]:
    geometry = Geometry(1, 32)
    allocator = PureSWATokenToKVPoolAllocator(
        PAGES * geometry.page_tokens, 1, torch.float32, "cpu", NoMemory(), need_sort=False
    )
    return WindowOnlyDevicePool(allocator, geometry, pages=3), allocator


def test_a_page_that_the_window_has_left_in_part_gives_back_the_rest() -> None:
    pool, allocator = device_pool()
    row = allocator.alloc(3 * 16)
    allocator.free_swa(row[:20])  # as the engine does; the row goes on naming them
    full, swa = pool.owned_slots(row, given_back=20)
    assert (swa[:2] == ABSENT).all()
    assert (swa[2] == row[32:].numpy()).all()
    assert pool.free_window_pages() == PAGES - 1
    assert (pool.row_tokens(full, swa)[:32] == 0).all(), "a row names what is not the cache's"
    pool.release_window(full[2:], swa[2:])
    assert pool.free_window_pages() == PAGES
    assert len(np.unique(allocator.alloc(PAGES * 16).numpy())) == PAGES * 16


def test_a_page_that_stays_with_its_request_is_freed_once() -> None:
    """After a digest collision the table takes less than it was offered."""
    pool, allocator = device_pool()
    row = allocator.alloc(2 * 16)
    allocator.free_swa(row[:4].clone())
    full, _ = pool.owned_slots(row, given_back=4)
    pool.stays_with_request(full)
    assert pool.free_pages() == 3
    allocator.free_segments([(row[4:], 4)])  # as the engine does when the request ends
    assert allocator.available_size() == PAGES * 16
    assert len(np.unique(allocator.alloc(PAGES * 16).numpy())) == PAGES * 16


def test_pages_are_numbers_that_come_back() -> None:
    pool, _ = device_pool()
    first = pool.allocate(2)
    assert first is not None
    assert pool.allocate(2) is None
    pool.release(first)
    assert pool.free_pages() == 3
    pool.allocate(3)
    pool.reset()
    assert pool.free_pages() == 3


def test_a_window_that_begins_behind_the_prompt_is_refused_by_name() -> None:
    runner = SimpleNamespace(prefill_aware_swa=True)
    kv_cache = SimpleNamespace(get_kvcache=lambda: None)
    context: Any = SimpleNamespace(
        params=SimpleNamespace(token_to_kv_pool_allocator=kv_cache),
        is_hybrid_ssm=False,
        is_hybrid_swa=True,
        tp_worker=SimpleNamespace(model_runner=runner),
    )
    with pytest.raises(StartupError, match=r"read their whole prompt .* not supported"):
        factory._served_pool(context)
