"""A child process of test_drafts: pages of a model with drafts, moved between the tiers.

Every plane of a page has to come along: those of the model, and those of its drafts, whatever their
shape is and wherever the engine has put them. Prints a line for each case; the engine keeps
process-wide state, so this does not run inside the tests.
"""

import dataclasses
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host import base, common
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_ext.adapter import host_pools, stacks
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.drafts import layers as draft_layers
from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.adapter.host_pools import HostStacks, build_host_stacks
from sglang_ext.adapter.page_copies import page_copies
from sglang_ext.adapter.stacks import schedule_of
from sglang_ext.adapter.storage_pools import pools_for_storage
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import Part
from sglang_ext_cpu import host_copies

TOKENS, WINDOW_TOKENS, CPU = 1024, 512, torch.device("cpu")
LAYOUTS = (("page_first", "kernel"), ("page_first_direct", "direct"))


def hybrid(page: int, full: list[int], window: list[int], heads: int = 2) -> SWAKVPool:
    """A pool with full-attention and sliding-window layers."""
    return SWAKVPool(
        size=TOKENS,
        size_swa=WINDOW_TOKENS,
        page_size=page,
        dtype=torch.float32,
        head_num=heads,
        head_dim=4,
        swa_attention_layer_ids=window,
        full_attention_layer_ids=full,
        device="cpu",
    )


def packed(page: int) -> dict[str, Any]:
    """Three depths of a layer each, of the shape of the model's windows."""
    return {"mtp_draft_device_pools": tuple(hybrid(page, [], [0]) for _ in range(3))}


def of_another_shape(page: int) -> dict[str, Any]:
    """A draft with full attention, other heads and other widths."""
    pool = MHATokenToKVPool(TOKENS, page, torch.float32, 3, 8, 1, "cpu", False)
    return {"sidecar_draft_device_pools": (pool,)}


def small_model(page: int) -> dict[str, Any]:
    """A draft that is a model of both kinds of layers, in another type."""
    return {"sidecar_draft_device_pools": (hybrid(page, [1, 3], [0, 2, 4], heads=1),)}


def none(page: int) -> dict[str, Any]:
    return {}


def layers(pools: list[Any]) -> list[torch.Tensor]:
    """K and V of each layer of each pool."""
    return [buffer for pool in pools for buffer in (*pool.k_buffer, *pool.v_buffer)]


def of_component(target: SWAKVPool, drafts: dict[str, Any], component: int) -> list[torch.Tensor]:
    """All that a page of a component is, by the engine's own pools."""
    own = target.full_kv_pool, target.swa_kv_pool
    pools = [own[component]]
    for draft in itertools.chain(*drafts.values()):
        if isinstance(draft, SWAKVPool):
            pools.append((draft.full_kv_pool, draft.swa_kv_pool)[component])
        elif component == FULL:
            pools.append(draft)
    return layers(pools)


class Tiers:
    """A model with drafts, its host memory, and what copies."""

    def __init__(self, page: int, layout: str, backend: str, drafts: dict[str, Any]) -> None:
        memory = SimpleNamespace(
            hicache_size=0.0,
            hicache_ratio=3.0,
            hicache_mem_layout=layout,
            hicache_storage_backend=None,
        )
        for module in (runtime_context, hybrid_pool_assembler, common):
            module.get_memory = lambda: memory
            module.get_parallel = lambda: SimpleNamespace(dcp_enabled=False)
        self.geometry = Geometry(page, 40, whole_pages=True, overlap=1)
        self.target, self.drafts = hybrid(page, [1, 3], [0, 2]), drafts
        allocator = SimpleNamespace(
            size_full=TOKENS,
            size_swa=WINDOW_TOKENS,
            swa_attn_allocator=SimpleNamespace(alloc=None, free=None),
        )
        params: Any = SimpleNamespace(
            page_size=page,
            token_to_kv_pool_allocator=allocator,
            pp_cache_group=None,
            **{"mtp_draft_device_pools": (), "sidecar_draft_device_pools": (), **drafts},
        )
        found = draft_layers(params)
        self.host = build_host_stacks(params, self.target, found, self.geometry)
        self.copies = {
            kind: page_copies(kind, self.host.pools, SlotIndices(self.geometry), backend, CPU)
            for kind in ("engine", "kernels")
        }
        for buffer in self.buffers(FULL) + self.buffers(WINDOW):
            buffer.copy_(torch.randn(buffer.shape))

    def buffers(self, component: int) -> list[torch.Tensor]:
        return of_component(self.target, self.drafts, component)

    def parts(self, component: int, host: np.ndarray, device: np.ndarray) -> list[Part]:
        """Pages of the table as pages of the engine, in each pool that has a part of them."""
        per_page = self.geometry.slots_per_page
        on_device = (device[:, None] * per_page + np.arange(per_page)).reshape(-1)
        on_host = self.host.memory.arena.slots(host).reshape(-1).astype(np.int64)
        return [Part(pool, on_host, on_device) for pool in self.host.of_components[component]]

    def tokens(self, pages: np.ndarray) -> torch.Tensor:
        offsets = np.arange(self.geometry.page_tokens)
        first = pages[:, None] * self.geometry.page_tokens
        return torch.from_numpy((first + offsets).reshape(-1))


def round_trip(tiers: Tiers, kind: str) -> None:
    """Pages of both components to the host, elsewhere on it, and back to other places."""
    memory, arena = tiers.host.memory, tiers.host.memory.arena
    sources, targets = np.array([1, 3, 2]), np.array([6, 4, 5])
    schedule = schedule_of(tiers.target, tiers.host.stacks)
    assert len(schedule) == 4, "a gate for each layer of the model"
    loaded = [layer for gate in schedule for layer in gate]
    assert len(set(loaded)) == len(loaded)
    for component in (FULL, WINDOW):
        before = [buffer.clone() for buffer in tiers.buffers(component)]
        pages = arena.allocate(component, 3)
        assert pages is not None
        tiers.copies[kind].prepare(tiers.parts(component, pages, sources)).backup()
        places = arena.allocate(component, 3)
        assert places is not None
        memory.move(component, arena.slots(pages), arena.slots(places))
        other = "kernels" if kind == "engine" else "engine"
        loads = tiers.copies[other].prepare(tiers.parts(component, places, targets))
        for gate in schedule:
            for layer in gate:
                loads.load_layer(*layer)
        buffers = tiers.buffers(component)
        for buffer, old in zip(buffers, before, strict=True):
            old[tiers.tokens(targets)] = old[tiers.tokens(sources)]
            assert torch.equal(buffer, old), "a layer was left behind"
        stored(tiers, component, places)
        arena.release(component, pages)
        arena.release(component, places)


def stored(tiers: Tiers, component: int, pages: np.ndarray) -> None:
    """An object of storage is all that a page is."""
    pool = list(tiers.host.for_storage().values())[component]
    indices = SlotIndices(tiers.geometry).tokens(tiers.host.memory.arena.slots(pages))
    _, sizes = pool.get_page_buffer_meta(indices)
    rows = [buffer[0].nbytes for buffer in tiers.buffers(component)]
    assert sum(sizes) == len(pages) * tiers.geometry.page_tokens * sum(rows), "bytes are missing"
    assert sum(rows) * tiers.geometry.page_tokens == sum(
        tiers.host.memory.arena.shape.page_bytes[component]
    ), "the budget does not count all bytes"


def drafts_are_not_copied() -> None:
    own = property(lambda self: ((FULL,), (WINDOW,)))
    HostStacks.of_components = own  # type: ignore[method-assign, assignment]


def drafts_are_not_loaded() -> None:
    original = stacks.schedule_of
    globals()["schedule_of"] = lambda target, found: original(target, found[:0])


def drafts_stay_when_a_page_moves() -> None:
    move = ArenaMemory.move

    def without(self: ArenaMemory, component: int, source: Any, target: Any) -> None:
        shape = self.arena.shape
        sizes = tuple((*page[:2], *[0] * len(page[2:])) for page in shape.page_bytes)
        self.arena.shape = dataclasses.replace(shape, page_bytes=sizes)
        move(self, component, source, target)
        self.arena.shape = shape

    ArenaMemory.move = without  # type: ignore[method-assign]


def drafts_are_not_stored() -> None:
    def without(found: Any, entries: Any, memory: ArenaMemory) -> Any:
        return pools_for_storage(found[:2], entries[:2], memory)

    host_pools.pools_for_storage = without


def drafts_are_not_paid_for() -> None:
    def own(self: stacks.Stack, geometry: Geometry) -> tuple[int, int]:
        return stacks.page_bytes(self.pools[0], geometry)

    stacks.Stack.page_bytes = own  # type: ignore[method-assign]


def main() -> None:
    """Every case, and what came of it."""
    host_copies.install()
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40  # whatever else is running here
    for bug in sys.argv[1:]:
        globals()[bug]()
    for make, page, (layout, backend) in itertools.product(
        (none, packed, of_another_shape, small_model), (1, 16, 64), LAYOUTS
    ):
        try:
            tiers = Tiers(page, layout, backend, make(page))
            for kind in ("engine", "kernels"):
                round_trip(tiers, kind)
            tiers.host.memory.close()
        except (AssertionError, IndexError, RuntimeError, ValueError, TypeError) as error:
            print(make.__name__, page, layout, repr(error))
        else:
            print(make.__name__, page, layout, "ok")


if __name__ == "__main__":
    main()
