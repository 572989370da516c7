"""The host tier on SGLang's host pools: their size and memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_ext.adapter import pipeline
from sglang_ext.adapter.controller import Pools
from sglang_ext.adapter.drafts import layers as draft_layers
from sglang_ext.adapter.host_arena import ArenaMemory, tensors_from
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.page_copies import Pool
from sglang_ext.adapter.stacks import Stack, bytes_by_plane, layers_by_component, stacks_of
from sglang_ext.config import BACKEND
from sglang_ext.core.host.arena import ArenaShape, shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


class HostKv(NamedTuple):
    """The host tier's pools.

    Attributes:
        group: as the engine has them.
        memory: which they share.
        stacks: what is in them, in the order of the group.
    """

    group: "HostPoolGroup"
    memory: ArenaMemory
    stacks: list[Stack]

    @property
    def pools(self) -> list[Pool]:
        """By number, see ``transfer.job``; the first two are the target's."""
        found: list[Pool] = [(e.host_pool, e.device_pool) for e in self.group.entries]
        return found if self.stacks[0].component == FULL else [None, *found]

    @property
    def of_components(self) -> Pools:
        """Numbers of the pools that have a page of each component."""
        first = self.stacks[0].component
        by = [(stack.component, number) for number, stack in enumerate(self.stacks, start=first)]
        full, window = (tuple(n for c, n in by if c == of) for of in (FULL, WINDOW))
        return full, window


def host_budget(device_bytes: int) -> tuple[int, str]:
    """(bytes of host memory of this rank, what says so): the engine's ``--hicache-size`` in GB,
    or ``--hicache-ratio`` times the device pools."""
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if memory.hicache_size > 0:
        return int(memory.hicache_size * 1e9), f"--hicache-size {memory.hicache_size:g}"
    return int(device_bytes * memory.hicache_ratio), f"--hicache-ratio {memory.hicache_ratio:g}"


def build_host_kv(params: "CacheInitParams", pool: "SWAKVPool", geometry: Geometry) -> HostKv:
    """SGLang's host pools for both components and their drafts, and the memory that they share; for
    the one component of a model without full-attention layers.

    Raises:
        StartupError: the budget is too small or the machine has not as much, or the
            components cannot share a memory.
    """
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_bytes

    stacks = stacks_of(pool, draft_layers(params))
    sizes = bytes_by_plane(stacks, geometry)
    allocator: Any = params.token_to_kv_pool_allocator
    tokens = (allocator.size_full, allocator.size_swa)[-len(sizes) :]
    pages = [count // geometry.page_tokens for count in tokens]
    budget, source = host_budget(sum(n * sum(size) for n, size in zip(pages, sizes, strict=True)))
    try:
        shape = shape_for(budget, sizes, geometry.slots_per_page)
    except ValueError as error:
        raise StartupError(
            f"{BACKEND}: this model's KV cannot share a host memory: {error}; use the device "
            f"alone, without --enable-hierarchical-cache, or {OWN_CACHE}"
        ) from error
    pipeline.refuse_unlike(params, (shape.extents, *map(sum, shape.page_bytes)))
    least = 2 * sum(shape.extent_bytes)
    if shape.extents < 2:
        raise StartupError(
            f"--hicache-size or --hicache-ratio: {budget} bytes of host memory are too little; "
            f"at least {least} are needed for this model"
        )
    available = host_memory_budget_bytes()
    if budget > available:
        raise StartupError(
            f"--hicache-size or --hicache-ratio asks for {budget / 1e9:.2f} GB of host memory; "
            f"{max(0, available) / 1e9:.2f} GB are available to this rank; ask for less"
        )
    memory = ArenaMemory(shape, source, pin=torch.device(pool.device).type == "cuda")
    asked = [size_to_ask_for(shape, stack, geometry) for stack in stacks]
    with tensors_from(memory):
        group = _group_of_target(params, pool, stacks, asked)
    of_target = len(group.entries)
    for stack, size in zip(stacks[of_target:], asked[of_target:], strict=True):
        with tensors_from(memory, stack.plane):
            group.add_entry(_entry_of_drafts(params, stack, size))
    return HostKv(group, memory, stacks)


def _group_of_target(
    params: "CacheInitParams", pool: "SWAKVPool", stacks: Sequence[Stack], asked: Sequence[float]
) -> "HostPoolGroup":
    """The target's pools, and what is packed into them.

    Args:
        asked: GB of each.
    """
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup

    full_layers, swa_layers = layers_by_component(pool)
    if full_layers:
        return assembler.build_hybrid_swa_group(
            page_size=params.page_size,
            full_kv_pool=pool.full_kv_pool,
            swa_kv_pool=pool.swa_kv_pool,
            full_layer_mapping=full_layers,
            swa_layer_mapping=swa_layers,
            use_mla=False,
            kv_host_size=asked[FULL],
            swa_host_size=asked[WINDOW],
            swa_attn_allocator=params.token_to_kv_pool_allocator.swa_attn_allocator,
            mtp_full_device_pools=stacks[FULL].pools[1:],
            mtp_swa_device_pools=stacks[WINDOW].pools[1:],
        )
    host_pool = assembler.build_kv_host_pool(
        kv_pool=pool.swa_kv_pool,
        page_size=params.page_size,
        use_mla=False,
        host_size=asked[0],
        pool_label="swa",
    )
    entry = assembler.build_pool_entry(
        name=PoolName.SWA,
        host_pool=host_pool,
        device_pool=pool.swa_kv_pool,
        layer_mapping=swa_layers,
        transfer_layer_id_max=max(swa_layers) + 1,
        is_anchor=True,
    )
    return HostPoolGroup([entry])


def _entry_of_drafts(params: "CacheInitParams", stack: Stack, asked: float) -> "PoolEntry":
    """A pool of drafts of a shape of their own."""
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler

    first, *others = stack.pools
    host_pool = assembler.build_kv_host_pool(
        kv_pool=first,
        page_size=params.page_size,
        use_mla=False,
        host_size=asked,
        mtp_draft_device_pools=tuple(others),
        pool_label="draft",
    )
    return assembler.build_pool_entry(
        name=PoolName.DRAFT if stack.component == FULL else PoolName.DRAFT_SWA,
        host_pool=host_pool,
        device_pool=first,
        layer_mapping={layer: layer for layer in range(first.layer_num)},
        transfer_layer_id_max=stack.layers,
        packed_draft_device_pools=tuple(others),
    )


def size_to_ask_for(shape: ArenaShape, stack: Stack, geometry: Geometry) -> float:
    """GB to ask for, so that the engine makes a pool of exactly the arena's slots: it rounds
    down and adds a page."""
    token_bytes = sum(stack.page_bytes(geometry)) / geometry.page_tokens
    component = min(stack.component, len(shape.page_bytes) - 1)
    slots = shape.pages(component) * shape.slots_per_page
    return ((slots - 1) * geometry.device_page + 0.5) * token_bytes / 1e9
