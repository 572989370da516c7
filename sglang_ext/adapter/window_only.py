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

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.core.host.arena import Arena, ArenaPool, ArenaShape
from sglang_ext.core.inserts import Own
from sglang_ext.core.table.columns import ABSENT, Slots
from sglang_ext.core.table.geometry import Geometry

if TYPE_CHECKING:
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

    def takes(self, pages: int) -> int:
        """See ``EngineDevicePool.takes``; not more than there are numbers for."""
        return min(pages, self.free_pages())

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
