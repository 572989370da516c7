"""What a simulated engine is built with, and its requests."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.columns import Rows, Slots
from sglang_ext.core.eviction import NO_SPARE, Spare
from sglang_ext.core.plan import Hold
from sglang_ext.core.state import BackupPolicy
from sglang_ext.core.write_policy import WritePolicy


class DeviceFullError(Exception):
    """The device has no room; a real engine retracts a request."""


@dataclasses.dataclass(eq=False)
class SimRequest:
    """A running request.

    Attributes:
        full, swa: (n,) its device slots, those of the table first.
        path: rows that it holds.
        protected: slots ``[0, protected)`` belong to the table; some slots of the last of
            ``path`` may not be among them: the request resumed inside that page.
    """

    tokens: NDArray[np.int64]
    namespace: object
    full: Slots
    swa: Slots
    path: Rows
    protected: int
    computed: int
    lock: Hold
    waits_for: int
    number: int
    priority: int

    @property
    def done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.computed >= len(self.tokens)


@dataclasses.dataclass(eq=False, frozen=True)
class Arrival:
    """A request that waits for storage, and the prefetch it waits for, if any."""

    tokens: NDArray[np.int64]
    namespace: object
    priority: int
    op: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine is built with; pages are table pages.

    Attributes:
        eviction: the engine's name of the policy.
        storage_threshold: fewest pages worth a prefetch; 0 for no storage.
        storage_stop: see StorageLimits.
        spare: what an eviction may free beyond what is asked for.
        storage_share: storage may hold up one in so many host pages as on a server.
        extent_pages: 0 for a host pool of each component; else both share the memory that
            the two would have, in extents of so many of the larger pages.
    """

    device_pages: int
    device_window_pages: int
    host_pages: int = 0
    host_window_pages: int = 0
    checkpoint_pages: int = 4
    pinned_share: int = 4
    low_share: int = 4
    write: WritePolicy = WritePolicy.WRITE_THROUGH
    extent_pages: int = 0
    eviction: str = "lru"
    spare: Spare = NO_SPARE
    storage_threshold: int = 0
    storage_stop: int = 1
    storage_share: int = 1

    def policy(self) -> BackupPolicy:
        """The backup policy of these sizes."""
        return BackupPolicy(
            write=self.write,
            checkpoint_pages=self.checkpoint_pages,
            pinned_pages=max(1, self.device_pages // self.pinned_share),
            pinned_window_pages=max(1, self.device_window_pages // self.pinned_share),
            low_pages=self.device_pages // self.low_share,
            low_window_pages=self.device_window_pages // self.low_share,
        )
