"""Models whose every layer has a sliding window: there is nothing to keep but windows.

The engine has one pool for them, in pages of one token, and finds a token's KV by the index in
the request's row, without a map from full-attention slots. For the core the pages of their
prefixes still have full-attention copies, on the device and on the host: numbers without
memory, of which there are as many as the table has rows. So a prefix is matched as a whole, and
only its last window is stored, loaded and locked.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.host.arena import Arena, ArenaPool, ArenaShape
from sglang_ext.core.inserts import Own
from sglang_ext.core.table.columns import ABSENT, Slots
from sglang_ext.core.table.geometry import Geometry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.allocator.swa import PureSWATokenToKVPoolAllocator

ROWS_PER_WINDOW_PAGE = 8
"""Pages of prefixes that the table has room for, for each one that has KV."""


def numbers(pages: int, geometry: Geometry) -> ArenaPool:
    """Slots without memory, for so many pages."""
    shape = ArenaShape(1, (pages,), ((1,),), geometry.slots_per_page)
    return ArenaPool(Arena(shape), 0)


class WindowOnlyDevicePool:
    """DevicePool (see ``core.ports``) over ``PureSWATokenToKVPoolAllocator``.

    Args:
        pages: full-attention pages, which are numbers.
    """

    rows_name_full = False

    def __init__(
        self, allocator: "PureSWATokenToKVPoolAllocator", geometry: Geometry, pages: int
    ) -> None:
        self._allocator = allocator
        self._device = allocator.device
        self._page_tokens = geometry.page_tokens
        self._indices = SlotIndices(geometry)
        self._numbers = numbers(pages, geometry)

    def free_pages(self) -> int:
        """See DevicePool."""
        return self._numbers.room(0)

    def free_window_pages(self) -> int:
        """See DevicePool."""
        return int(self._allocator.swa_available_size()) // self._page_tokens

    def allocate(self, pages: int) -> Slots | None:
        """See DevicePool."""
        return self._numbers.allocate(pages)

    def allocate_window(self, pages: int) -> Slots | None:
        """See DevicePool."""
        tokens = self._allocator.swa_attn_allocator.alloc(pages * self._page_tokens)
        return None if tokens is None else self._indices.slots(tokens)

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
        self._numbers.release(full)

    def release_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._allocator.free_swa(self._indices.first_tokens(swa).to(self._device))

    def owned_slots(
        self, tokens: torch.Tensor, given_back: int, own: Own | None = None
    ) -> tuple[Slots, Slots]:
        """See ``EngineDevicePool.owned_slots``; there must be free numbers."""
        swa = self._indices.slots(tokens)
        lost = -(-given_back // self._page_tokens)
        if given_back % self._page_tokens:
            rest = tokens[given_back : lost * self._page_tokens]
            self._allocator.free_swa(rest.clone())
            # a view of the row: if the page stays with the request, it must not free it again
            rest.zero_()
        swa[:lost] = ABSENT
        full = self._numbers.allocate(len(swa))
        assert full is not None, "more pages than numbers"
        return full, swa

    def stays_with_request(self, full: Slots) -> None:
        """See ``EngineDevicePool.stays_with_request``."""
        self._numbers.release(full)

    def row_tokens(self, full: Slots, swa: Slots) -> torch.Tensor:
        """See ``EngineDevicePool.row_tokens``. Where there is no KV the row names the engine's
        padding; it is outside of every window that is read."""
        return self._indices.tokens(np.maximum(swa, 0)).to(self._device)

    def reset(self) -> None:
        """All slots are free, of the engine's allocator too."""
        self._numbers.arena.clear()


class WindowOnlyCache(SwaHiCache):
    """The cache of a model without full-attention layers."""

    def checkpoint(self, req: "Req", *, up_to: int, **kwargs: object) -> None:
        """See SwaHiCache; not more pages than there are numbers for, the others stay with the
        request."""
        first = req.kv.cache_protected_len // self._page_tokens
        pages = up_to // self._page_tokens - first
        self.index.evict_device(pages - self._device_pool.free_pages(), 0)
        most = (first + self._device_pool.free_pages()) * self._page_tokens
        super().checkpoint(req, up_to=min(up_to, most), **kwargs)

    def evict(self, params: EvictParams) -> EvictResult:
        """See SwaHiCache; the engine names either number."""
        tokens = max(params.num_tokens, params.swa_num_tokens)
        return super().evict(EvictParams(num_tokens=0, swa_num_tokens=tokens))

    def _kv_slots(self, pages: int, window_pages: int) -> int:
        """Other pages are numbers."""
        return window_pages

    def reset(self) -> None:
        """See SwaHiCache."""
        tier = self.index.host_tier
        super().reset()
        if tier is not None:
            assert isinstance(tier.full, ArenaPool)
            tier.full.arena.clear()

    def full_evictable_size(self) -> int:
        """There is no full-attention KV."""
        return 0

    def full_protected_size(self) -> int:
        """There is no full-attention KV."""
        return 0

    def evictable_size(self) -> int:
        """As ``swa_evictable_size``."""
        return self.swa_evictable_size()

    def protected_size(self) -> int:
        """As ``swa_protected_size``."""
        return self.swa_protected_size()
