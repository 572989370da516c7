"""Pools that only count: a replay has no memory whose slots would matter."""

import numpy as np

from sglang_ext.core.table.columns import Slots
from sglang_ext.core.table.geometry import Geometry


class CountedDevicePool:
    """DevicePool (see ``core.ports``) of so many pages of each component."""

    def __init__(self, pages: int, window_pages: int, geometry: Geometry) -> None:
        self._free = pages
        self._free_windows = window_pages
        self._per_page = geometry.slots_per_page

    def free_pages(self) -> int:
        """See DevicePool."""
        return self._free

    def free_window_pages(self) -> int:
        """See DevicePool."""
        return self._free_windows

    def allocate(self, pages: int) -> Slots | None:
        """See DevicePool."""
        if pages > self._free:
            return None
        self._free -= pages
        return np.zeros((pages, self._per_page), dtype=np.int32)

    def allocate_window(self, pages: int) -> Slots | None:
        """See DevicePool."""
        if pages > self._free_windows:
            return None
        self._free_windows -= pages
        return np.zeros((pages, self._per_page), dtype=np.int32)

    def allocate_bound(self, slots: int) -> tuple[Slots, Slots] | None:
        """See DevicePool; a replay works in whole pages of the table."""
        return None

    def copy(self, full: Slots, swa: Slots, new_full: Slots, new_swa: Slots) -> None:
        """See DevicePool."""

    def bind_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""

    def move_window(self, source: Slots, target: Slots, swa: Slots) -> None:
        """See DevicePool."""

    def release(self, full: Slots) -> None:
        """See DevicePool."""
        self._free += len(full)

    def release_window(self, full: Slots, swa: Slots) -> None:
        """See DevicePool."""
        self._free_windows += len(swa)


class NoBytes:
    """HostMemory (see ``core.ports``) in which nothing is to be moved."""

    def move(self, component: int, source: Slots, target: Slots) -> None:
        """See HostMemory."""
