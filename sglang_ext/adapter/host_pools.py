"""The host tier on SGLang's host pools: their size and memory."""

from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter import pipeline
from sglang_ext.adapter.host_arena import ArenaMemory, tensors_from
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.config import BACKEND
from sglang_ext.core.host.arena import ArenaShape, shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def layers_by_component(pool: "SWAKVPool") -> tuple[dict[int, int], dict[int, int]]:
    """(full, sliding-window) maps of the model's layer number to the pool's."""
    full: dict[int, int] = {}
    swa: dict[int, int] = {}
    for layer, (local, is_swa) in pool.layers_mapping.items():
        (swa if is_swa else full)[layer] = local
    return full, swa


def page_bytes(pool: Any, geometry: Geometry) -> tuple[int, int]:
    """Bytes of one table page of a device pool: (K, V), all layers."""
    info = pool.get_device_pool_infos()[0].buffer_info
    rows = len(info.buffers.k) * info.head_num * info.dtype.itemsize * geometry.page_tokens
    return rows * info.head_dim, rows * info.v_head_dim


def host_budget(device_bytes: int) -> tuple[int, str]:
    """(bytes of host memory of this rank, what says so): the engine's ``--hicache-size`` in GB,
    or ``--hicache-ratio`` times the device pools."""
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if memory.hicache_size > 0:
        return int(memory.hicache_size * 1e9), f"--hicache-size {memory.hicache_size:g}"
    return int(device_bytes * memory.hicache_ratio), f"--hicache-ratio {memory.hicache_ratio:g}"


def build_host_group(
    params: "CacheInitParams", pool: "SWAKVPool", geometry: Geometry
) -> tuple["HostPoolGroup", ArenaMemory]:
    """SGLang's host pools for both components, and the memory that they share; for the one
    component of a model without full-attention layers.

    Raises:
        StartupError: the budget is too small or the machine has not as much, or the
            components cannot share a memory.
    """
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_bytes

    allocator: Any = params.token_to_kv_pool_allocator
    full_layers, _ = layers_by_component(pool)
    components = [(allocator.size_full, pool.full_kv_pool)] if full_layers else []
    components.append((allocator.size_swa, pool.swa_kv_pool))
    sizes = tuple(page_bytes(device_pool, geometry) for _, device_pool in components)
    pages = [tokens // geometry.page_tokens for tokens, _ in components]
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
    build = _both_components if full_layers else _windows_alone
    with tensors_from(memory):
        return build(params, pool, shape, geometry), memory


def _both_components(
    params: "CacheInitParams", pool: "SWAKVPool", shape: ArenaShape, geometry: Geometry
) -> "HostPoolGroup":
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_hybrid_swa_group

    full_layers, swa_layers = layers_by_component(pool)
    return build_hybrid_swa_group(
        page_size=params.page_size,
        full_kv_pool=pool.full_kv_pool,
        swa_kv_pool=pool.swa_kv_pool,
        full_layer_mapping=full_layers,
        swa_layer_mapping=swa_layers,
        use_mla=False,
        kv_host_size=size_to_ask_for(shape, 0, geometry),
        swa_host_size=size_to_ask_for(shape, 1, geometry),
        swa_attn_allocator=params.token_to_kv_pool_allocator.swa_attn_allocator,
    )


def _windows_alone(
    params: "CacheInitParams", pool: "SWAKVPool", shape: ArenaShape, geometry: Geometry
) -> "HostPoolGroup":
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup

    _, layers = layers_by_component(pool)
    host_pool = assembler.build_kv_host_pool(
        kv_pool=pool.swa_kv_pool,
        page_size=params.page_size,
        use_mla=False,
        host_size=size_to_ask_for(shape, 0, geometry),
        pool_label="swa",
    )
    entry = assembler.build_pool_entry(
        name=PoolName.SWA,
        host_pool=host_pool,
        device_pool=pool.swa_kv_pool,
        layer_mapping=layers,
        transfer_layer_id_max=max(layers) + 1,
        is_anchor=True,
    )
    return HostPoolGroup([entry])


def size_to_ask_for(shape: ArenaShape, component: int, geometry: Geometry) -> float:
    """GB to ask for, so that the engine makes a pool of exactly the arena's slots: it rounds
    down and adds a page."""
    token_bytes = sum(shape.page_bytes[component]) / geometry.page_tokens
    slots = shape.pages(component) * shape.slots_per_page
    return ((slots - 1) * geometry.device_page + 0.5) * token_bytes / 1e9
