"""The host memory of a cache, and who owns which part of it."""

import dataclasses

from sglang_ext.core.host.arena import Arena, ArenaPool
from sglang_ext.core.ports import HostMemory, HostPool


@dataclasses.dataclass(frozen=True, slots=True)
class HostTier:
    """The host memory of a cache with a host tier.

    Attributes:
        full, window: a pool for each component.
        shared: the memory that they share, None if each has its own.
        page_bytes: of a page of each.
        size: of all of it, in bytes.
    """

    full: HostPool
    window: HostPool
    shared: "SharedMemory | None" = None
    page_bytes: tuple[int, int] = (1, 1)
    size: int = 0

    @classmethod
    def on(cls, arena: Arena, memory: HostMemory) -> "HostTier":
        """Both components in one memory."""
        shape = arena.shape
        full, window = (sum(planes) for planes in shape.page_bytes)
        pools = ArenaPool(arena, 0), ArenaPool(arena, 1)
        size = shape.extents * sum(shape.extent_bytes)
        return cls(*pools, SharedMemory(arena, memory), (full, window), size)

    @classmethod
    def of_windows(cls, numbers: HostPool, arena: Arena) -> "HostTier":
        """Windows in all of a memory; pages of full attention are numbers."""
        shape = arena.shape
        size = shape.extents * sum(shape.extent_bytes)
        return cls(numbers, ArenaPool(arena, 0), None, (0, sum(shape.page_bytes[0])), size)


@dataclasses.dataclass(frozen=True, slots=True)
class SharedMemory:
    """One memory for both components: component 0 is full attention, 1 the windows."""

    arena: Arena
    memory: HostMemory
