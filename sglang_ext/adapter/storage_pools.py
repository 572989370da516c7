"""Host pools as SGLang's storage backends see them.

Both pools lie in one memory (``host_arena``): K in one plane, V in the other. A backend that
computes addresses by itself would take each pool for a tensor of its own, so it gets a copy of
the pool object whose addresses are right, and one registration of the whole memory.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup

    from sglang_ext.adapter.host_arena import ArenaMemory


def pools_for_storage(group: "HostPoolGroup", memory: "ArenaMemory") -> dict[Any, Any]:
    """Host pools by the engine's names, to register with a storage backend."""
    views = {}
    for number, entry in enumerate(group.entries):
        pool = copy.copy(entry.host_pool)
        # pages in address order: K and V of each page, as the engine's own pools do
        pool.get_page_buffer_meta = _PageBuffers(entry.host_pool)
        pool.get_data_page = entry.host_pool.get_data_page
        pool.set_from_flat_data_page = entry.host_pool.set_from_flat_data_page
        whole = memory.whole(entry.host_pool.dtype)
        buffers = [whole] if number == 0 else []
        pool.get_hybrid_pool_buffer = lambda buffers=buffers: buffers
        pool.kv_buffer = whole
        views[entry.name] = pool
    return views


class _PageBuffers:
    """Addresses and sizes of K and V of pages: what ``get_page_buffer_meta`` returns."""

    def __init__(self, pool: Any) -> None:
        self._page = int(pool.page_size)
        slots = int(pool.size) // self._page
        planes = [pool.k_buffer, pool.v_buffer]
        self._planes = [
            (plane.data_ptr(), plane.numel() * plane.element_size() // slots) for plane in planes
        ]

    def __call__(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """For token indices of whole pages: [K, V, K, V, ...], addresses and bytes."""
        slots = (indices[:: self._page] // self._page).tolist()
        addresses = [base + slot * size for slot in slots for base, size in self._planes]
        return addresses, [size for _ in slots for _, size in self._planes]
