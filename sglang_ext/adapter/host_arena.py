"""One host allocation behind SGLang's host pools.

Each pool is the engine's own class with its own layout and copies; only its tensors are
views of the arena's memory, handed out by a host tensor allocator.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_ext.adapter import engine_patches
from sglang_ext.adapter.progress import memory_progress, progress
from sglang_ext.core.host.arena import Arena, ArenaShape
from sglang_ext.core.table.columns import Slots
from sglang_ext.errors import StartupError
from sglang_ext.planning.table import size

_REGISTERED = "_sglang_cuda_host_registered_ranges"
"""Attribute in which the engine keeps what it has to unregister of a host tensor."""
_ENOUGH = 1 << 62


class ArenaMemory:
    """The bytes of an arena: K of all pages in one plane, V in the next one; so for each shape of
    layers.

    HostMemory (see ``core.ports``).

    Args:
        pin: register the memory with CUDA, once for all pools.

    Attributes:
        source: what says how large it is.
    """

    def __init__(self, shape: ArenaShape, source: str = "", *, pin: bool) -> None:
        from sglang.srt.mem_cache.pool_host import common

        self.source = source
        self.arena = Arena(shape)
        total = sum(shape.plane_bytes)
        with memory_progress(total):
            self._bytes = common.HostTensorAllocator().allocate((total,), torch.uint8, "cpu")
        self._pinned: list[torch.Tensor] = []
        if pin:
            most = max(1, common.envs.SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB.get()) * 1024**3
            self._pin(registrations(shape, most))

    def _pin(self, spans: list[tuple[int, int]]) -> None:
        from sglang.srt.mem_cache.pool_host.common import _cuda_host_register

        def done() -> str:
            return f"{size(sum(map(len, self._pinned)))} of {size(len(self._bytes))}"

        try:
            with progress("host memory is pinned for CUDA", done):
                for start, stop in spans:
                    span = self._bytes[start:stop]
                    _cuda_host_register(span)
                    self._pinned.append(span)
        except Exception:
            self.close()
            raise

    def plane(self, number: int, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor over the beginning of a plane."""
        sizes = self.arena.shape.plane_bytes
        start, used = sum(sizes[:number]), math.prod(dims) * dtype.itemsize
        assert used <= sizes[number], f"{dims} is more than the arena holds"
        return self._bytes[start : start + used].view(dtype).view(dims)

    def both_planes(self, first: int, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor (2, ...) whose halves are the beginnings of a plane and of the next one."""
        sizes = self.arena.shape.plane_bytes
        assert sizes[first] == sizes[first + 1], "K and V of one tensor are equally large"
        assert dims[0] == 2, f"{dims} is not K and V"
        half = self.plane(first + 1, dims[1:], dtype)
        whole = self.plane(first, (sizes[first] // dtype.itemsize,), dtype)
        apart = half.storage_offset() - whole.storage_offset()
        return half.as_strided(dims, (apart, *half.stride()), whole.storage_offset())

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All of the memory, for registration."""
        return self._bytes[: len(self._bytes) // dtype.itemsize * dtype.itemsize].view(dtype)

    def move(self, component: int, source: Slots, target: Slots) -> None:
        """See HostMemory. A slot is contiguous in each plane, in every layout by pages."""
        shape = self.arena.shape
        old, new = source.reshape(-1), target.reshape(-1)
        for number, page_bytes in enumerate(shape.page_bytes[component]):
            if page_bytes == 0:
                continue
            slot_bytes = page_bytes // shape.slots_per_page
            slots = shape.plane_bytes[number] // slot_bytes
            # NumPy copies whole rows, where PyTorch's indexing takes byte by byte
            rows = self.plane(number, (slots, slot_bytes), torch.uint8).numpy()
            rows[new] = rows[old]

    def close(self) -> None:
        """Unregister the memory."""
        from sglang.srt.mem_cache.pool_host.common import _cuda_host_unregister

        while self._pinned:
            _cuda_host_unregister(self._pinned.pop())


def registrations(shape: ArenaShape, most_bytes: int) -> list[tuple[int, int]]:
    """Spans of bytes in which the memory of an arena is registered: as few as possible, none
    larger than ``most_bytes``, and none ends inside a page. Copies must not go across two.

    Raises:
        StartupError: an extent is larger than that.
    """
    if max(shape.extent_bytes) > most_bytes:
        raise StartupError(
            f"SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB {most_bytes / 1024**3:g} is too little; "
            f"at least {-(-max(shape.extent_bytes) // 1024**3)} is needed for this model"
        )
    # a page lies in one extent, and extents of a plane one behind the other
    planes = shape.plane_bytes
    total, start, spans = sum(planes), 0, []
    while start < total:
        stop = _last_end(shape, min(start + most_bytes, total))
        spans.append((start, stop))
        start = stop
    return spans


def _last_end(shape: ArenaShape, limit: int) -> int:
    """The last end of an extent up to ``limit``, in any plane."""
    before = 0
    for plane, extent in zip(shape.plane_bytes, shape.extent_bytes, strict=True):
        if limit <= before + plane:
            return before + (limit - before) // extent * extent
        before += plane
    return before


class _Allocator:
    """What the engine calls a host tensor allocator: gives one pool its buffers.

    Pools with K and V of equal width ask once, for (2, ...); others for K and then for V.

    Args:
        first: the plane of K.
    """

    def __init__(self, memory: ArenaMemory, first: int) -> None:
        self._memory = memory
        self._first = first
        self._asked = 0

    def allocate(self, dims: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        """A view of the arena."""
        assert device == "cpu", f"host memory on {device}"
        k_bytes, v_bytes = self._memory.arena.shape.plane_bytes[self._first : self._first + 2]
        if k_bytes == v_bytes:
            view = self._memory.both_planes(self._first, dims, dtype)
        else:
            view = self._memory.plane(self._first + self._asked, dims, dtype)
        self._asked += 1
        # the memory is registered as a whole, not by its pools
        setattr(view, _REGISTERED, [])
        return view


@contextlib.contextmanager
def tensors_from(memory: ArenaMemory, first: int = 0) -> Iterator[None]:
    """Host pools that are built inside get their tensors from ``memory``, K from the ``first``
    plane of each."""
    from sglang.srt.mem_cache.pool_host import base

    def allocator() -> _Allocator:
        return _Allocator(memory, first)

    allocators_from = engine_patches.HOST_ALLOCATOR.find() or _replaced_allocators
    with (
        allocators_from(allocator),
        # every pool would ask for memory of its own
        base.host_memory_budget_scope(_ENOUGH),
        only_ours_says_how_much(base.logger),
    ):
        yield


@contextlib.contextmanager
def _replaced_allocators(make_allocator: Callable[[], _Allocator]) -> Iterator[None]:
    """The engine has no place for an allocator of ours, so two of its functions are replaced."""
    from sglang.srt.mem_cache.pool_host import base, common

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (base, "get_allocator_from_storage", lambda _: make_allocator()),
        (common, "_cuda_host_register", lambda *_: None),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, replacement in replaced:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


@contextlib.contextmanager
def only_ours_says_how_much(logger: logging.Logger) -> Iterator[None]:
    """Each pool would say that it allocates all of the memory: see ``start_plan``."""

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Allocating ")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class HostUsage:
    """What the engine's metrics read of a host pool, for both components together.

    Counts in tokens of full-attention KV.
    """

    def __init__(self, arena: Arena, page_tokens: int) -> None:
        self._arena = arena
        self._page_tokens = page_tokens
        self._page_bytes = [sum(size) for size in arena.shape.page_bytes]
        self.logical_size = self._tokens(sum(arena.shape.plane_bytes))

    def available_size(self) -> int:
        """Tokens that are free."""
        pages = enumerate(self._page_bytes)
        used = sum(self._arena.taken(component) * size for component, size in pages)
        return self.logical_size - self._tokens(used)

    def _tokens(self, size: int) -> int:
        return size * self._page_tokens // self._page_bytes[0]
