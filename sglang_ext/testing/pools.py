"""Pools without memory: they hand out slots and remember what each one holds.

The content of a slot is the *tag* of the prefix that ends with it (see ``prefix_tags``),
so "this slot holds the KV of that prefix" is a comparison of integers. A slot that
was given back holds ``STALE``. Contents are kept for each layer: layers of one page
are copied at different times.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.table.columns import Slots
from sglang_ext.core.table.geometry import Geometry

STALE = -1
LAYERS = 2
Tags = NDArray[np.int64]


def prefix_tags(tokens: NDArray[np.int64], namespace: object, geometry: Geometry) -> Tags:
    """Tag of every slot that ``tokens`` (1-D) name: depends on all tokens up to its end, and on
    those behind it that its KV is of as well."""
    page, tag, tags = geometry.device_page, hash(namespace), []
    for end in range(page, geometry.named(len(tokens)) + 1, page):
        own = tokens[end - page : end + geometry.overlap]
        tag = hash((tag, own.tobytes())) & 0x7FFFFFFFFFFF
        tags.append(tag)
    return np.array(tags, dtype=np.int64)


class SimSlots:
    """Slots of one component in one tier, with their contents.

    Attributes:
        content: (LAYERS, slots) tags.
        allocations_to_fail: the next so many calls of ``allocate`` answer None.
    """

    def __init__(self, slots: int, geometry: Geometry) -> None:
        self._per_page = geometry.slots_per_page
        self.total = slots
        self.allocations_to_fail = 0
        self.clear()

    def clear(self) -> None:
        """Take all slots back, as the engine does in a flush."""
        self.free: list[int] = list(range(self.total))
        self._taken = np.zeros(self.total, dtype=bool)
        self.content: Tags = np.full((LAYERS, self.total), STALE, dtype=np.int64)

    @property
    def total_pages(self) -> int:
        """Whole table pages that fit."""
        return self.total // self._per_page

    def room(self, used: int) -> int:
        """See HostPool: an allocation that failed must not be seen in it."""
        return self.total_pages - used

    def free_pages(self) -> int:
        """Whole table pages left."""
        return len(self.free) // self._per_page

    def allocate(self, pages: int) -> Slots | None:
        """Slots for ``pages``, all or nothing. Contents stay what they were: STALE."""
        if self.allocations_to_fail and pages:
            self.allocations_to_fail -= 1
            return None
        slots = self.take(pages * self._per_page)
        return None if slots is None else slots.reshape(pages, self._per_page)

    def take(self, count: int) -> Slots | None:
        """Single slots, all or nothing."""
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        self._taken[taken] = True
        return np.array(taken, dtype=np.int32)

    def release(self, slots: Slots) -> None:
        """Give back slots and spoil their contents. Freeing twice is an error."""
        flat = slots.reshape(-1)
        assert flat.size == 0 or (flat.min() >= 0 and flat.max() < self.total), "no such slot"
        assert self._taken[flat].all(), "a free slot was freed again"
        self._taken[flat] = False
        assert int(self._taken.sum()) == self.used - len(flat), "a slot freed twice in one call"
        self.free.extend(flat.tolist())
        self.content[:, flat] = STALE

    def write(self, slots: Slots, tags: Tags) -> None:
        """Store the tag of each slot."""
        self.content[:, slots] = tags

    def holds(self, slots: Slots, tags: Tags, layers: slice = slice(None)) -> bool:
        """Whether each slot holds its tag."""
        return bool((self.content[layers, slots] == tags).all())

    def get(self, layer: int, slots: Slots) -> Tags:
        """Tag of each slot."""
        tags: Tags = self.content[layer, slots]
        return tags

    def put(self, layer: int, slots: Slots, tags: Tags | int) -> None:
        """Write the tag of each slot."""
        self.content[layer, slots] = tags

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
        self.clear()

    def clear(self) -> None:
        """Take everything back, as the engine does in a flush."""
        self.full.clear()
        self.window.clear()
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

    def allocate_bound(self, slots: int) -> tuple[Slots, Slots] | None:
        """See DevicePool."""
        if slots > min(len(self.full.free), len(self.window.free)):
            return None
        full, swa = self.full.take(slots), self.window.take(slots)
        assert full is not None
        assert swa is not None
        self.bind_window(full, swa)
        return full, swa

    def copy(self, full: Slots, swa: Slots, new_full: Slots, new_swa: Slots) -> None:
        """See DevicePool."""
        for slots, old, new in ((self.full, full, new_full), (self.window, swa, new_swa)):
            slots.content[:, new] = slots.content[:, old]

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
