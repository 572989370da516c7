"""The host tier on SGLang's host pools: layers with K and V."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_ext.adapter.controller import Pools
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.drafts import DraftLayers, described
from sglang_ext.adapter.host_arena import ArenaMemory, tensors_from
from sglang_ext.adapter.host_kv import build_memory
from sglang_ext.adapter.page_copies import Pool, chosen, page_copies, planes
from sglang_ext.adapter.stacks import (
    Stack,
    bytes_by_plane,
    layers_by_component,
    page_bytes,
    schedule_of,
    stacks_of,
)
from sglang_ext.adapter.storage_pools import pools_for_storage
from sglang_ext.config import BACKEND
from sglang_ext.core.host.arena import ArenaShape
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Plane
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import PageCopies, Schedule

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


class HostStacks(NamedTuple):
    """HostKv (see ``host_kv``) in the engine's host pools.

    Attributes:
        group: as the engine has them.
        memory: which they share.
        stacks: what is in them, in the order of the group.
        target: pool of the device, of the model's own layers.
        geometry: of the pages.
    """

    group: "HostPoolGroup"
    memory: ArenaMemory
    stacks: list[Stack]
    target: "SWAKVPool"
    geometry: Geometry

    @property
    def pools(self) -> list[Pool]:
        """By number, see ``transfer.job``; the first two are the target's."""
        found: list[Pool] = [(e.host_pool, e.device_pool) for e in self.group.entries]
        return found if self.stacks[0].component == FULL else [None, *found]

    @property
    def of_components(self) -> Pools:
        """See HostKv."""
        first = self.stacks[0].component
        by = [(stack.component, number) for number, stack in enumerate(self.stacks, start=first)]
        full, window = (tuple(n for c, n in by if c == of) for of in (FULL, WINDOW))
        return full, window

    @property
    def schedule(self) -> Schedule:
        """See HostKv."""
        return schedule_of(self.target, self.stacks)

    @property
    def planes(self) -> list[list[Plane]]:
        """See HostKv."""
        return [planes(pool) for pool in self.pools]

    def copied_by(self, kind: str | None, device: torch.device) -> str:
        """See HostKv."""
        return chosen(kind, device)

    def copies(
        self, who: str, indices: SlotIndices, io_backend: str, device: torch.device
    ) -> PageCopies:
        """See HostKv."""
        return page_copies(who, self.pools, indices, io_backend, device)

    @property
    def layout(self) -> str:
        """See HostKv."""
        return str(self.group.entries[0].host_pool.layout)

    def described(self) -> dict[str, Any]:
        """See HostKv."""
        components = (self.target.full_kv_pool, self.target.swa_kv_pool)
        return {
            "kv": [str(component.dtype) for component in components],
            "page_bytes": [page_bytes(component, self.geometry) for component in components],
            "layers": [sorted(layers) for layers in layers_by_component(self.target)],
            **described(self.stacks, self.geometry),
        }

    def refuse_storage(self, backend: str) -> None:
        """See HostKv."""
        if len(self.group.entries) == 1:
            raise StartupError(
                f"{BACKEND}: a storage tier for models without full-attention layers is not "
                "supported; use the host tier alone: without --hicache-storage-backend"
            )
        if backend != "file" and any(stack.is_apart for stack in self.stacks):
            raise StartupError(
                f"--hicache-storage-backend {backend} is not supported with drafts whose KV is of "
                "another shape than the model's; allowed: file"
            )

    def for_storage(self) -> dict[Any, Any]:
        """See HostKv."""
        return pools_for_storage(self.stacks, self.group.entries, self.memory)

    def close(self) -> None:
        """See HostKv."""
        self.group.destroy()
        self.memory.close()


class StackedKv:
    """ModelKv (see ``model_kv``) in ``SWAKVPool``: layers with K and V for each token.

    Args:
        target: of the model's own layers.
        drafts: layers with the same slots.
    """

    def __init__(
        self,
        params: "CacheInitParams",
        target: "SWAKVPool",
        drafts: Sequence[DraftLayers],
        geometry: Geometry,
    ) -> None:
        self._params = params
        self._target = target
        self._geometry = geometry
        self.drafts = drafts

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """See ModelKv."""
        stacks = stacks_of(self._target, self.drafts)
        return tuple(map(sum, bytes_by_plane(stacks, self._geometry)))

    def build_host(self) -> HostStacks:
        """See ModelKv."""
        return build_host_stacks(self._params, self._target, self.drafts, self._geometry)


def build_host_stacks(
    params: "CacheInitParams",
    pool: "SWAKVPool",
    drafts: Sequence[DraftLayers],
    geometry: Geometry,
) -> HostStacks:
    """SGLang's host pools for both components and their drafts, and the memory that they share; for
    the one component of a model without full-attention layers.

    Raises:
        StartupError: see ``host_kv.build_memory``.
    """
    stacks = stacks_of(pool, drafts)
    sizes = bytes_by_plane(stacks, geometry)
    memory = build_memory(params, sizes, geometry, torch.device(pool.device))
    asked = [size_to_ask_for(memory.arena.shape, stack, geometry) for stack in stacks]
    with tensors_from(memory):
        group = _group_of_target(params, pool, stacks, asked)
    of_target = len(group.entries)
    for stack, size in zip(stacks[of_target:], asked[of_target:], strict=True):
        with tensors_from(memory, stack.plane):
            group.add_entry(_entry_of_drafts(params, stack, size))
    return HostStacks(group, memory, stacks, pool, geometry)


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
