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
    """

    full: HostPool
    window: HostPool
    shared: "SharedMemory | None" = None

    @classmethod
    def on(cls, arena: Arena, memory: HostMemory) -> "HostTier":
        """Both components in one memory."""
        return cls(ArenaPool(arena, 0), ArenaPool(arena, 1), SharedMemory(arena, memory))


@dataclasses.dataclass(frozen=True, slots=True)
class SharedMemory:
    """One memory for both components: component 0 is full attention, 1 the windows."""

    arena: Arena
    memory: HostMemory
