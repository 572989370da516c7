"""An arena with contents: what one component writes, the other one's pages would show."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_ext.core.host.arena import Arena, ArenaPool, ArenaShape
from sglang_ext.core.table.columns import Slots
from sglang_ext.testing.pools import LAYERS, STALE, Tags
from sglang_ext.testing.sizes import Sizes

_SLOT_BYTES = (2, 3)
"""Of each component: neither is a multiple of the other."""


class SimSharedMemory:
    """Bytes of an arena, each with the tag of the page that was last written there.

    HostMemory (see ``core.ports``).

    Attributes:
        in_flight: host slots of a component that transfers read or write.
    """

    def __init__(self, arena: Arena, slot_bytes: tuple[int, int]) -> None:
        self.arena = arena
        self.in_flight: Callable[[int], list[Slots]] = lambda _: []
        (size,) = arena.shape.plane_bytes
        self.content: Tags = np.full((LAYERS, size), STALE, dtype=np.int64)
        self.full, self.window = (
            SharedSlots(self, component, size) for component, size in enumerate(slot_bytes)
        )

    @classmethod
    def of(cls, sizes: Sizes, per_page: int) -> "SimSharedMemory":
        """As much as separate pools of these sizes would have together."""
        page_bytes = [size * per_page for size in _SLOT_BYTES]
        total = sizes.host_pages * page_bytes[0] + sizes.host_window_pages * page_bytes[1]
        extent_bytes = sizes.extent_pages * max(page_bytes) + 1
        pages = tuple((size,) for size in page_bytes)
        shape = ArenaShape(total // extent_bytes, (extent_bytes,), pages, per_page)
        return cls(Arena(shape), _SLOT_BYTES)

    def move(self, component: int, source: Slots, target: Slots) -> None:
        """See HostMemory. What is left behind is spoiled."""
        for busy in self.in_flight(component):
            assert not np.isin((source, target), busy).any(), "moved what a transfer uses"
        slots = (self.full, self.window)[component]
        for layer in range(LAYERS):
            slots.put(layer, target, slots.get(layer, source))
            gone = np.setdiff1d(source, target)
            slots.put(layer, gone, np.full(len(gone), STALE))

    def clear(self) -> None:
        """Take everything back."""
        self.arena.clear()
        self.content[:] = STALE


class SharedSlots(ArenaPool):
    """One component's slots; the part of SimSlots that an engine and its lanes use."""

    def __init__(self, memory: SimSharedMemory, component: int, slot_bytes: int) -> None:
        super().__init__(memory.arena, component)
        self._memory = memory
        self._bytes = np.arange(slot_bytes)
        self._per_page = memory.arena.shape.slots_per_page

    @property
    def total(self) -> int:
        """Slots if the whole memory belonged to this component."""
        return int(self._memory.content.shape[1]) // len(self._bytes)

    @property
    def used(self) -> int:
        """Slots handed out."""
        return int(self.arena.taken(self.component) * self._per_page)

    def release(self, slots: Slots) -> None:
        """See HostPool; spoils the contents."""
        super().release(slots)
        for layer in range(LAYERS):
            self.put(layer, slots, np.full(slots.shape, STALE))

    def clear(self) -> None:
        """Take everything back, the other component's too."""
        self._memory.clear()

    def get(self, layer: int, slots: Any) -> Tags:
        """Tag of each slot; STALE where its bytes are of different pages."""
        found = self._memory.content[layer, self._span(slots)]
        mixed = (found != found[..., :1]).any(axis=-1)
        return np.where(mixed, STALE, found[..., 0])

    def put(self, layer: int, slots: Any, tags: Any) -> None:
        """Write the tag of each slot."""
        self._memory.content[layer, self._span(slots)] = np.asarray(tags)[..., None]

    def holds(self, slots: Slots, tags: Tags) -> bool:
        """Whether each slot holds its tag, in every layer."""
        return all((self.get(layer, slots) == tags).all() for layer in range(LAYERS))

    def _span(self, slots: Any) -> Any:
        return np.asarray(slots, dtype=np.int64)[..., None] * len(self._bytes) + self._bytes
