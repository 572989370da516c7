"""An arena with contents: what one component writes, the other one's pages would show."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_ext.core.host.arena import Arena, ArenaPool, ArenaShape
from sglang_ext.core.table.columns import Slots
from sglang_ext.testing.pools import LAYERS, STALE, Tags
from sglang_ext.testing.sizes import SLOT_BYTES, Sizes


class SimSharedMemory:
    """Bytes of an arena, each with the tag of the page that was last written there. One plane is
    the model's, another one that of its draft.

    HostMemory (see ``core.ports``).

    Attributes:
        in_flight: host slots of a component that transfers read or write.
    """

    def __init__(self, arena: Arena, slot_bytes: Sequence[Sequence[int]]) -> None:
        self.arena = arena
        self.in_flight: Callable[[int], list[Slots]] = lambda _: []
        self.content: list[Tags] = [
            np.full((LAYERS, size), STALE, dtype=np.int64) for size in arena.shape.plane_bytes
        ]
        self.full, self.window = (
            SharedSlots(self, component, sizes) for component, sizes in enumerate(slot_bytes)
        )

    @classmethod
    def of(cls, sizes: Sizes, per_page: int) -> "SimSharedMemory":
        """As much as separate pools of these sizes would have together, in the first plane."""
        full, window = pages = [tuple(size * per_page for size in planes) for planes in SLOT_BYTES]
        total = sizes.host_pages * full[0] + sizes.host_window_pages * window[0]
        extent_bytes = sizes.extent_pages * max(full[0], window[0]) + 1
        planes = (extent_bytes, extent_bytes * full[1] // full[0])
        shape = ArenaShape(total // extent_bytes, planes, tuple(pages), per_page)
        return cls(Arena(shape), SLOT_BYTES)

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
        for plane in self.content:
            plane[:] = STALE


class SharedSlots(ArenaPool):
    """One component's slots; the part of SimSlots that an engine and its lanes use.

    Attributes:
        memory: that they are in.
    """

    def __init__(self, memory: SimSharedMemory, component: int, sizes: Sequence[int]) -> None:
        super().__init__(memory.arena, component)
        self.memory = memory
        self._planes = [(plane, np.arange(size)) for plane, size in enumerate(sizes) if size]
        self._per_page = memory.arena.shape.slots_per_page

    @property
    def total(self) -> int:
        """Slots if the whole memory belonged to this component."""
        plane, own = self._planes[0]
        return int(self.memory.content[plane].shape[1]) // len(own)

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
        self.memory.clear()

    def get(self, layer: int, slots: Any) -> Tags:
        """Tag of each slot; STALE where its bytes are of different pages."""
        spans = self._spans(slots)
        found = np.concatenate([self.memory.content[p][layer, at] for p, at in spans], axis=-1)
        mixed = (found != found[..., :1]).any(axis=-1)
        return np.where(mixed, STALE, found[..., 0])

    def put(self, layer: int, slots: Any, tags: Any) -> None:
        """Write the tag of each slot."""
        for plane, span in self._spans(slots):
            self.memory.content[plane][layer, span] = np.asarray(tags)[..., None]

    def holds(self, slots: Slots, tags: Tags) -> bool:
        """Whether each slot holds its tag, in every layer."""
        return all((self.get(layer, slots) == tags).all() for layer in range(LAYERS))

    def _spans(self, slots: Any) -> list[tuple[int, Any]]:
        first = np.asarray(slots, dtype=np.int64)[..., None]
        return [(plane, first * len(own) + own) for plane, own in self._planes]
