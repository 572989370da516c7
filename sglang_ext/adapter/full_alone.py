"""Models without a pool of windows: full attention is all there is.

The core resumes requests where there is a window. Here each page of a prefix has a window of one
page: a number on the device, and a few bytes on the host that nobody reads. So a request resumes at
the end of every page that is there.
"""

from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter.byte_pages import ByteHost, ByteLayers, rows_by_page, sizes_of
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_kv import build_memory
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.window_only import numbers
from sglang_ext.config import BACKEND
from sglang_ext.core.inserts import Own
from sglang_ext.core.table.columns import Slots
from sglang_ext.core.table.geometry import MIN_PAGE_TOKENS, Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW

if TYPE_CHECKING:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

NO_WINDOWS = ByteLayers(WINDOW, "none", (), ())


def is_pool(pool: Any) -> bool:
    """Whether a pool of the engine is K and V, or latent rows, of one kind of layers."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    return type(pool) in (MHATokenToKVPool, MLATokenToKVPool)


def refuse_other_forms(params: "CacheInitParams", drafts_have_kv: bool) -> None:
    """Check what is beside a pool.

    Raises:
        StartupError: it is not served without windows.
    """
    form = allowed = ""
    if params.page_size < MIN_PAGE_TOKENS:
        form, allowed = f"--page-size {params.page_size}", f"--page-size {MIN_PAGE_TOKENS} or more"
    if drafts_have_kv:
        form, allowed = "drafts with KV of their own", "--speculative-algorithm NGRAM"
    if form:
        raise StartupError(
            f"{BACKEND}: {form} is not supported for a model without a pool of windows; allowed: "
            f"{allowed}; or use {OWN_CACHE}"
        )


class FullAloneKv:
    """ModelKv (see ``model_kv``) in one pool.

    Args:
        target: see ``is_pool``.
    """

    drafts = ()
    """None is copied in part: a page of the table is one of the allocator."""

    def __init__(
        self,
        params: "CacheInitParams",
        target: "MHATokenToKVPool | MLATokenToKVPool",
        geometry: Geometry,
    ) -> None:
        self._params = params
        self._target = target
        self._geometry = geometry
        page = geometry.device_page
        # latent rows are K and V in one
        buffers = [target.kv_buffer] if hasattr(target, "kv_buffer") else [
            target.k_buffer, target.v_buffer
        ]  # fmt: skip
        planes = tuple(tuple(rows_by_page(layer, page) for layer in plane) for plane in buffers)
        kind = type(target).__name__
        self._layers = [ByteLayers(FULL, kind, tuple(range(len(planes[0]))), planes), NO_WINDOWS]

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """See ModelKv."""
        return sizes_of(self._layers)

    def build_host(self) -> ByteHost:
        """See ModelKv."""
        pool, sizes = self._target, [(size,) for size in self.page_bytes]
        memory = build_memory(self._params, sizes, self._geometry, torch.device(pool.device))
        described = {"kv": str(pool.dtype)}
        return ByteHost(
            memory, self._layers, len(self._layers[0].before), self._geometry, described
        )


class FullAloneDevicePool:
    """DevicePool (see ``core.ports``) over the engine's allocator of one pool.

    Args:
        pages: of the device.
    """

    rows_name_full = True

    def __init__(
        self, allocator: "BaseTokenToKVPoolAllocator", geometry: Geometry, pages: int
    ) -> None:
        self._allocator: Any = allocator
        self._page_tokens = geometry.page_tokens
        self._indices = SlotIndices(geometry)
        # a request hands over pages that the table has already, with numbers for them
        self._numbers = numbers(2 * pages, geometry)
        self._handed_over: Slots | None = None

    def free_pages(self) -> int:
        """See DevicePool."""
        return int(self._allocator.available_size()) // self._page_tokens

    def free_window_pages(self) -> int:
        """See DevicePool."""
        return self._numbers.room(0)

    def allocate(self, pages: int) -> Slots | None:
        """See DevicePool."""
        tokens = self._allocator.alloc(pages * self._page_tokens)
        return None if tokens is None else self._indices.slots(tokens)

    def allocate_window(self, pages: int) -> Slots | None:
        """See DevicePool."""
        return self._numbers.allocate(pages)

    def allocate_bound(self, slots: int) -> tuple[Slots, Slots] | None:
        """See DevicePool; requests resume at whole pages of the table here."""
        return None

    def copy(self, full: Slots, swa: Slots, new_full: Slots, new_swa: Slots) -> None:
        """See DevicePool; nothing is copied inside pages."""

    def bind_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool; there is no map."""

    def move_window(self, source: Slots, target: Slots, swa: Slots) -> None:
        """See DevicePool; there is no map."""

    def release(self, full: Slots) -> None:
        """See DevicePool."""
        self._allocator.free_page_ids(self._indices.page_ids(full).to(self._allocator.device))

    def release_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._numbers.release(swa)

    def owned_slots(
        self, tokens: torch.Tensor, given_back: int, own: Own | None = None
    ) -> tuple[Slots, Slots]:
        """See ``EngineDevicePool.owned_slots``; the engine gives nothing back here."""
        full = self._indices.slots(tokens)
        self._handed_over = self._numbers.allocate(len(full))
        assert self._handed_over is not None, "more pages than numbers"
        return full, self._handed_over

    def takes(self, pages: int) -> int:
        """See ``EngineDevicePool.takes``."""
        return pages

    def stays_with_request(self, full: Slots) -> None:
        """See ``EngineDevicePool.stays_with_request``; the last ones that were named."""
        assert self._handed_over is not None
        if len(full):
            self._numbers.release(self._handed_over[-len(full) :])

    def row_tokens(self, full: Slots, swa: Slots) -> torch.Tensor:
        """See ``EngineDevicePool.row_tokens``."""
        return self._indices.tokens(full).to(self._allocator.device)

    def reset(self) -> None:
        """All slots are free, of the engine's allocator too."""
        self._numbers.arena.clear()
