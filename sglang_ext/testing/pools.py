"""Pools without memory: they hand out slots and remember what each one holds.

The content of a slot is the *tag* of the prefix it belongs to (see ``prefix_tags``),
so "this page holds the KV of that prefix" is a comparison of integers. A slot that
was given back holds ``STALE``.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Slots
from sglang_ext.core.geometry import Geometry

STALE = -1
Tags = NDArray[np.int64]


def prefix_tags(tokens: NDArray[np.int64], namespace: object, geometry: Geometry) -> Tags:
    """Tag of every whole page of ``tokens`` (1-D): depends on all tokens up to its end."""
    page = geometry.page_tokens
    ends = range(page, len(tokens) + 1, page)
    tags = [hash((namespace, tokens[:end].tobytes())) & 0x7FFFFFFFFFFF for end in ends]
    return np.array(tags, dtype=np.int64)


class SimSlots:
    """Slots of one component in one tier, with their contents."""

    def __init__(self, slots: int, geometry: Geometry) -> None:
        self._per_page = geometry.slots_per_page
        self.total = slots
        self.free: list[int] = list(range(slots))
        self.content: Tags = np.full(slots, STALE, dtype=np.int64)

    def free_pages(self) -> int:
        """Whole table pages left."""
        return len(self.free) // self._per_page

    def allocate(self, pages: int) -> Slots | None:
        """Slots for ``pages``, all or nothing. Contents stay what they were: STALE."""
        count = pages * self._per_page
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return np.array(taken, dtype=np.int32).reshape(pages, self._per_page)

    def release(self, slots: Slots) -> None:
        """Give back slots and spoil their contents. Freeing twice is an error."""
        flat = slots.reshape(-1).tolist()
        assert len(set(flat)) == len(flat), "a slot freed twice in one call"
        assert not set(flat) & set(self.free), "a free slot was freed again"
        assert all(0 <= slot < self.total for slot in flat), "freed a slot that does not exist"
        self.free.extend(flat)
        self.content[flat] = STALE

    def write(self, slots: Slots, tags: Tags) -> None:
        """Store the tag of each page in all of its slots."""
        self.content[slots] = tags[:, None]

    def holds(self, slots: Slots, tags: Tags) -> bool:
        """Whether each page's slots hold its tag."""
        return bool((self.content[slots] == tags[:, None]).all())

    @property
    def used(self) -> int:
        """Slots handed out."""
        return self.total - len(self.free)


class SimDevicePool:
    """DevicePool with the engine's rule that a window slot is the peer of a full slot."""

    def __init__(self, pages: int, window_pages: int, geometry: Geometry) -> None:
        per_page = geometry.slots_per_page
        self.full = SimSlots(pages * per_page, geometry)
        self.window = SimSlots(window_pages * per_page, geometry)
        self.peer: dict[int, int] = {}

    def free_pages(self) -> int:
        """See DevicePool."""
        return self.full.free_pages()

    def free_window_pages(self) -> int:
        """See DevicePool."""
        return self.window.free_pages()

    def allocate(self, pages: int) -> Slots | None:
        """See DevicePool."""
        return self.full.allocate(pages)

    def allocate_window(self, pages: int) -> Slots | None:
        """See DevicePool."""
        return self.window.allocate(pages)

    def bind_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        for slot, peer in _pairs(full, swa):
            assert slot not in self.peer, "a full slot got a second peer"
            self.peer[slot] = peer

    def move_window(self, source: Slots, target: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._unbind(source, swa)
        self.bind_window(target, swa)

    def release(self, full: Slots) -> None:
        """See DevicePool."""
        assert not set(full.reshape(-1).tolist()) & self.peer.keys(), "peer left behind"
        self.full.release(full)

    def release_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._unbind(full, swa)
        self.window.release(swa)

    def _unbind(self, full: Slots, swa: Slots) -> None:
        for slot, peer in _pairs(full, swa):
            assert self.peer.pop(slot) == peer, "released a peer of another slot"


def _pairs(full: Slots, swa: Slots) -> Iterator[tuple[int, int]]:
    return zip(full.reshape(-1).tolist(), swa.reshape(-1).tolist(), strict=True)
