"""Host pools as SGLang's storage backends see them.

All pools lie in one memory (``host_arena``): K in one plane, V in the next. A backend that
computes addresses by itself would take each pool for a tensor of its own, so it gets a copy of
the pool object whose addresses are right, and one registration of the whole memory. What drafts
have of a page in pools of their own is part of its object.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.adapter.stacks import Stack


def pools_for_storage(
    stacks: Sequence[Stack], entries: Sequence[Any], memory: ArenaMemory
) -> dict[Any, Any]:
    """See ``HostKv.for_storage``.

    Args:
        entries: of the engine's host pools, one for each stack.
        memory: that they share.
    """
    views: dict[Any, Any] = {}
    buffers: dict[int, list[Any]] = {}
    for stack, entry in zip(stacks, entries, strict=True):
        buffers.setdefault(stack.component, []).append(entry.host_pool)
    for number, (stack, entry) in enumerate(zip(stacks, entries, strict=True)):
        if stack.is_apart:
            continue
        pool = copy.copy(entry.host_pool)
        # pages in address order: K and V of each page, as the engine's own pools do
        pool.get_page_buffer_meta = _PageBuffers(buffers[stack.component])
        pool.get_data_page = entry.host_pool.get_data_page
        pool.set_from_flat_data_page = entry.host_pool.set_from_flat_data_page
        whole = memory.whole(entry.host_pool.dtype)
        registered = [whole] if number == 0 else []
        pool.get_hybrid_pool_buffer = lambda buffers=registered: buffers
        pool.kv_buffer = whole
        views[entry.name] = pool
    return views


class _PageBuffers:
    """Addresses and sizes of K and V of pages: what ``get_page_buffer_meta`` returns.

    Args:
        pools: those that have a part of each page.
    """

    def __init__(self, pools: Sequence[Any]) -> None:
        self._page = int(pools[0].page_size)
        slots = int(pools[0].size) // self._page
        planes = [plane for pool in pools for plane in (pool.k_buffer, pool.v_buffer)]
        self._planes = [
            (plane.data_ptr(), plane.numel() * plane.element_size() // slots) for plane in planes
        ]

    def __call__(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """For token indices of whole pages: [K, V, K, V, ...], addresses and bytes."""
        slots = (indices[:: self._page] // self._page).tolist()
        addresses = [base + slot * size for slot in slots for base, size in self._planes]
        return addresses, [size for _ in slots for _, size in self._planes]
