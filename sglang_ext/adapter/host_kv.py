"""The host tier's memory: what fits, and what the cache asks of the pages in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_ext.adapter import pipeline
from sglang_ext.adapter.controller import Pools
from sglang_ext.adapter.device_pool import SlotIndices, tokens_of
from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.config import BACKEND
from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Plane
from sglang_ext.transfer.job import PageCopies, Schedule

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


class HostKv(Protocol):
    """A model's KV on the host."""

    @property
    def memory(self) -> ArenaMemory:
        """Where it lies."""
        ...

    @property
    def of_components(self) -> Pools:
        """Numbers of the pools that have a page of each component."""
        ...

    @property
    def schedule(self) -> Schedule:
        """What is loaded for each layer of the model."""
        ...

    @property
    def planes(self) -> list[list[Plane]]:
        """Of each pool by its number, see ``transfer.job``."""
        ...

    def copied_by(self, kind: str | None, device: torch.device) -> str:
        """``engine`` or ``kernels``.

        Args:
            kind: what is asked for; None for the choice of this project.

        Raises:
            StartupError: it does not copy this KV.
        """
        ...

    def copies(
        self, who: str, indices: SlotIndices, io_backend: str, device: torch.device
    ) -> PageCopies:
        """Who moves the bytes.

        Args:
            who: see ``copied_by``.
            indices, io_backend, device: see ``page_copies.EngineCopies``.
        """
        ...

    @property
    def layout(self) -> str:
        """Of the host, by the engine's name."""
        ...

    def described(self) -> dict[str, Any]:
        """What decides on the bytes of a page; JSON."""
        ...

    def refuse_storage(self, backend: str) -> None:
        """Check a storage backend by the engine's name.

        Raises:
            StartupError: pages cannot be kept there.
        """
        ...

    def for_storage(self) -> dict[Any, Any]:
        """Host pools by the engine's names, one for each component, to register with a storage
        backend."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def host_budget(device_bytes: int) -> tuple[int, str]:
    """(bytes of host memory of this rank, what says so): the engine's ``--hicache-size`` in GB,
    or ``--hicache-ratio`` times the device pools."""
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if memory.hicache_size > 0:
        return int(memory.hicache_size * 1e9), f"--hicache-size {memory.hicache_size:g}"
    return int(device_bytes * memory.hicache_ratio), f"--hicache-ratio {memory.hicache_ratio:g}"


def build_memory(
    params: "CacheInitParams",
    sizes: Sequence[tuple[int, ...]],
    geometry: Geometry,
    device: torch.device,
) -> ArenaMemory:
    """One memory for all components, as large as the engine's options say.

    Args:
        sizes: bytes of a page of each component in each plane; of windows alone for a model
            without full-attention layers.
        device: of the KV.

    Raises:
        StartupError: the budget is too small or the machine has not as much, or the
            components cannot share a memory.
    """
    from sglang.srt.mem_cache.pool_host import base

    tokens = tokens_of(params.token_to_kv_pool_allocator)[-len(sizes) :]
    pages = [count // geometry.page_tokens for count in tokens]
    budget, source = host_budget(sum(n * sum(size) for n, size in zip(pages, sizes, strict=True)))
    try:
        shape = shape_for(budget, tuple(sizes), geometry.slots_per_page)
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
    available = base.host_memory_budget_bytes()
    if budget > available:
        raise StartupError(
            f"--hicache-size or --hicache-ratio asks for {budget / 1e9:.2f} GB of host memory; "
            f"{max(0, available) / 1e9:.2f} GB are available to this rank, with "
            f"{base.HICACHE_HOST_MEMORY_RESERVE_BYTES / 1024**3:.0f} GiB left to others; ask for "
            "less, or free memory"
        )
    return ArenaMemory(shape, source, pin=device.type == "cuda")
