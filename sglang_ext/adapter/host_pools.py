"""The host tier on SGLang's host pools: slots for the core, copies for transfers."""

from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.core.columns import Slots
from sglang_ext.core.geometry import Geometry

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.pool_host.base import HostKVCache
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


class EngineHostPool:
    """HostPool (see ``core.ports``) over one SGLang host pool."""

    def __init__(self, pool: "HostKVCache", geometry: Geometry) -> None:
        self._pool = pool
        self._page_tokens = geometry.page_tokens
        self._indices = SlotIndices(geometry)

    @property
    def total_pages(self) -> int:
        """See HostPool."""
        return int(self._pool.logical_size) // self._page_tokens

    def room(self, used: int) -> int:
        """See HostPool."""
        return self.total_pages - used

    def free_pages(self) -> int:
        """Table pages that the engine's pool could hand out now; for checks."""
        return int(self._pool.available_size()) // self._page_tokens

    def allocate(self, pages: int) -> Slots | None:
        """See HostPool."""
        tokens = self._pool.alloc(pages * self._page_tokens)
        return None if tokens is None else self._indices.slots(tokens)

    def release(self, slots: Slots) -> None:
        """See HostPool."""
        self._pool.free(self._indices.tokens(slots))


class EngineCopies:
    """ComponentCopies (see ``transfer.job``) over one SGLang host pool."""

    def __init__(
        self, host_pool: "HostKVCache", device_pool: Any, io_backend: str, device: torch.device
    ) -> None:
        self._host_pool = host_pool
        self._device_pool = device_pool
        self._io_backend = io_backend
        self._device = device

    def backup(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """See ComponentCopies."""
        # The staged page-first kernel walks host pages itself and wants them on the CPU.
        staged = bool(self._host_pool.can_use_write_back_jit)
        if self._io_backend == "kernel":
            device = self._to_device(device)
            host = host if staged else self._to_device(host)
        self._host_pool.backup_from_device_all_layer(
            self._device_pool, host, device, self._io_backend
        )

    def load_layer(self, layer: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """See ComponentCopies."""
        if self._io_backend == "kernel":
            host, device = self._to_device(host), self._to_device(device)
        self._host_pool.load_to_device_per_layer(
            self._device_pool, host, device, layer, self._io_backend
        )

    def _to_device(self, index: torch.Tensor) -> torch.Tensor:
        return index.to(self._device, non_blocking=True)


def layers_by_component(pool: "SWAKVPool") -> tuple[dict[int, int], dict[int, int]]:
    """(full, sliding-window) maps of the model's layer number to the pool's."""
    full: dict[int, int] = {}
    swa: dict[int, int] = {}
    for layer, (local, is_swa) in pool.layers_mapping.items():
        (swa if is_swa else full)[layer] = local
    return full, swa


def build_host_group(params: "CacheInitParams", pool: "SWAKVPool") -> "HostPoolGroup":
    """SGLang's host pools for both components, sized by the engine's own flags."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (
        _split_hicache_size,
        build_hybrid_swa_group,
    )
    from sglang.srt.runtime_context import get_memory

    full_layers, swa_layers = layers_by_component(pool)
    full_size = swa_size = None
    if get_memory().hicache_size > 0:
        full_size, swa_size = _split_hicache_size(
            get_memory().hicache_size, (pool.full_kv_pool, pool.swa_kv_pool)
        )
    return build_hybrid_swa_group(
        page_size=params.page_size,
        full_kv_pool=pool.full_kv_pool,
        swa_kv_pool=pool.swa_kv_pool,
        full_layer_mapping=full_layers,
        swa_layer_mapping=swa_layers,
        use_mla=False,
        kv_host_size=full_size,
        swa_host_size=swa_size,
        swa_attn_allocator=params.token_to_kv_pool_allocator.swa_attn_allocator,
    )
