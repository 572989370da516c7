"""What the core needs from outside: slots. Implemented by the adapter and by tests.

All arrays of slots are int32 of shape (rows, slots_per_page).
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.table.columns import Rows, Slots


class DevicePool(Protocol):
    """Device slots, owned by the engine's allocator.

    A sliding-window slot is the *peer* of a full-attention slot: the engine finds
    it through a map from full slots, so it cannot outlive its full slot.
    """

    def free_pages(self) -> int:
        """Table pages that ``allocate`` could hand out now."""
        ...

    def free_window_pages(self) -> int:
        """Table pages that ``allocate_window`` could hand out now."""
        ...

    def allocate(self, pages: int) -> Slots | None:
        """Full-attention slots without a peer, all or nothing."""
        ...

    def allocate_window(self, pages: int) -> Slots | None:
        """Sliding-window slots, not yet the peer of anything, all or nothing."""
        ...

    def allocate_bound(self, slots: int) -> tuple[Slots, Slots] | None:
        """Single full-attention slots (slots,) and sliding-window slots, their peers; all or
        nothing. Only where a page has several slots, as ``copy`` is."""
        ...

    def copy(self, full: Slots, swa: Slots, new_full: Slots, new_swa: Slots) -> None:
        """Copy the KV of slots with peers (n,) to others, in the order of the engine's
        forward passes."""
        ...

    def bind_window(self, full: Slots, swa: Slots) -> None:
        """Make ``swa`` the peers of ``full``."""
        ...

    def move_window(self, source: Slots, target: Slots, swa: Slots) -> None:
        """The peers ``swa`` of ``source`` become the peers of ``target``."""
        ...

    def release(self, full: Slots) -> None:
        """Give back full-attention slots that have no peer."""
        ...

    def release_window(self, full: Slots, swa: Slots) -> None:
        """Give back the peers ``swa`` of ``full``; ``full`` stays allocated."""
        ...


class HostPool(Protocol):
    """Host slots of one component. The core counts them, the pool hands them out."""

    def room(self, used: int) -> int:
        """Table pages that can be allocated; the same on every rank.

        Args:
            used: pages that the table and abandoned backups have.
        """
        ...

    def allocate(self, pages: int) -> Slots | None:
        """Slots, all or nothing. The core asks only for what is free by its count;
        None makes every rank decline the operation."""
        ...

    def release(self, slots: Slots) -> None:
        """Give back slots."""
        ...


class Departures(Protocol):
    """Who is told which pages leave, and why. Nothing that the core does depends on it."""

    def left_device(self, rows: Rows, *, windows: bool) -> None:
        """Pages are evicted from the device, or their windows alone."""
        ...

    def forgotten(self, rows: Rows, on_host: NDArray[np.bool_]) -> None:
        """Pages leave the table, and no copy is left of them. Their rows are still as they were.

        Args:
            on_host: (n,) whether the host had a copy.
        """
        ...


class HostMemory(Protocol):
    """The bytes behind the pages of an arena."""

    def move(self, component: int, source: Slots, target: Slots) -> None:
        """Copy pages of a component to other slots, at once. Nothing is in flight in either
        place."""
        ...
