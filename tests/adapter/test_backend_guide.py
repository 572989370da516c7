"""The backend in docs/storage-backends.md is one: it stores pages, and gives back the same."""

import ctypes
import types
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName

from sglang_ext.core.storage.plan import Objects
from sglang_ext.storage.port import FULL, WINDOW
from tests.adapter.file_tier import PAGE, WINDOW_PAGES, HostPool, Rank, keys
from tests.conftest import ROOT
from tests.core.storage_ranks import tokens
from tests.fixtures.documents import blocks

PAGES = 20
GUIDE = ROOT / "docs" / "storage-backends.md"


@pytest.fixture
def backend() -> Any:
    """The class of the page, with pools of a host."""
    (text,) = [text for kind, text in blocks(GUIDE) if kind == "python"]
    module: dict[str, Any] = {}
    exec(compile(text, str(GUIDE), "exec"), module)
    config = types.SimpleNamespace(model_name="model", tp_rank=0, tp_size=1, extra_config={})
    made = module["MemoryBackend"](config, {})
    assert isinstance(made, HiCacheStorage)
    pools = {PoolName.KV: HostPool(), PoolName.SWA: HostPool()}
    made.register_mem_pool_host(pools[PoolName.KV])
    for name, pool in pools.items():
        made.register_mem_host_pool_v2(pool, name)
    made.on_host_pools_registered()
    return made


def page(backend: Any, slot: int) -> memoryview:
    """Bytes of a page in the host pool of full attention."""
    indices = np.arange(slot * PAGE, (slot + 1) * PAGE)
    (address,), (size,) = backend.mem_pool_host.get_page_buffer_meta(indices)
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def test_a_prompt_is_written_and_can_be_resumed(backend: Any) -> None:
    rank, prompt = Rank(backend), tokens(PAGES)
    rank.serve(prompt)
    assert rank.reach(prompt) == rank.resume(prompt) == PAGES
    assert rank.resume(tokens(PAGES, seed=7)) == 0
    backend.clear()
    assert rank.reach(prompt) == 0


def test_the_same_bytes_come_back_elsewhere(backend: Any) -> None:
    store, names = Rank(backend).store, keys(tokens(3))
    for slot in range(3):
        page(backend, slot)[:] = bytes([slot + 1]) * len(page(backend, slot))
    assert store.store(FULL, Objects(names, np.array([[0], [1], [2]], dtype=np.int32))) == 3
    there = Objects(names, np.array([[5], [4], [6]], dtype=np.int32))
    assert store.load(FULL, there) == 3
    assert [page(backend, slot)[0] for slot in (5, 4, 6)] == [1, 2, 3]
    assert page(backend, 6) == page(backend, 2)


def test_a_page_that_is_not_there_ends_a_read(backend: Any) -> None:
    store, names = Rank(backend).store, keys(tokens(3))
    first, all_three = np.array([[0]], dtype=np.int32), np.array([[0], [1], [2]], dtype=np.int32)
    assert store.store(FULL, Objects(names[:1], first)) == 1
    assert store.load(FULL, Objects(names, all_three)) == 1
    assert store.load(WINDOW, Objects(names, all_three)) == 0
    assert store.resume_points(names, WINDOW_PAGES) == []
    assert store.store(WINDOW, Objects(names[:1], first)) == 1
    assert store.resume_points(names, WINDOW_PAGES) == [1]
