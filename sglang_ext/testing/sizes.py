"""What a simulated engine is built with, and priorities that its requests may have."""

import dataclasses

from sglang_ext.core.device.victims import NO_SPARE, Spare
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.retention.retention import Retention
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.core.table.table import NO_LESS, AgeLimits
from sglang_ext.core.write_policy import WritePolicy

PRIORITIES = (
    (-(1 << 63), -(1 << 31) - 1, -1000, -129),
    (-128, -1, 0, 1, 127, 128),
    (1000, 2000, (1 << 31) - 1, 1 << 31, 3_000_000_000, (1 << 63) - 1),
)
"""Low, middle and high ones, of the ends of what a request may have and of narrower types."""
SLOT_BYTES = ((2, 2), (3, 0))
"""Of each component of a shared memory, in each plane. Neither is a multiple of the other; a draft
has KV with the pages of one of them alone."""


class InTurns(Retention):
    """Learned retention decides most of the time, whatever it finds."""

    def learned(self, tier: int) -> bool:
        """See Retention; it is least recently used after every fourth rebuild."""
        return self.tick // self.rebuild % 4 < 3


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine is built with; pages are table pages.

    Attributes:
        eviction: name of the policy.
        spare_pages: see PageTable.
        rebuild: requests after which what is learned changes; 0 for a server's, and for who
            decides what a server goes by.
        storage_threshold: fewest pages worth a prefetch; 0 for no storage.
        storage_stop, storage_dense: see StorageLimits.
        low_pages, low_window_pages: see BackupPolicy; None for what ``low_share`` makes of it.
        host_is_ample: see BackupPolicy.
        as_on_a_server: the policy is what a server has with these sizes.
        spare: what an eviction may free beyond what is asked for.
        more_ticks: what ages have bits for, beyond what the table needs; 0 for a server's.
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
    spare_pages: int = 2
    rebuild: int = 0
    spare: Spare = NO_SPARE
    storage_threshold: int = 0
    storage_stop: int = 1
    storage_share: int = 1
    more_ticks: int = 0
    dense_pages: int = 0
    host_is_ample: bool = False
    storage_dense: int = 0
    low_pages: int | None = None
    low_window_pages: int | None = None
    as_on_a_server: bool = False

    def page_bytes(self, per_page: int) -> tuple[int, int]:
        """Of a page of each component on the host, of so many slots."""
        full, window = SLOT_BYTES if self.extent_pages else ((1,), (1,))
        return sum(full) * per_page, sum(window) * per_page

    def limits(self, rows: int) -> AgeLimits:
        """What ages of a table with so many rows have bits for."""
        return AgeLimits(ticks=2 * rows + self.more_ticks) if self.more_ticks else NO_LESS

    def retention(self, rows: int) -> Retention | None:
        """What learns for a table with so many rows; None for a server's."""
        return InTurns([rows], rebuild=self.rebuild) if self.rebuild else None

    def storage_limits(self, rows: int) -> StorageLimits:
        """Limits of a storage tier behind a host with so many pages."""
        return StorageLimits.for_host(
            rows // self.storage_share,
            self.storage_threshold,
            self.storage_stop,
            self.storage_dense,
        )

    def policy(self) -> BackupPolicy:
        """The backup policy of these sizes."""
        if self.as_on_a_server:
            return BackupPolicy.for_device(
                self.write,
                self.checkpoint_pages,
                self.device_pages,
                self.device_window_pages,
                self.host_pages,
            )
        low, low_window = self.low_pages, self.low_window_pages
        return BackupPolicy(
            write=self.write,
            checkpoint_pages=self.checkpoint_pages,
            pinned_pages=max(1, self.device_pages // self.pinned_share),
            pinned_window_pages=max(1, self.device_window_pages // self.pinned_share),
            low_pages=self.device_pages // self.low_share if low is None else low,
            low_window_pages=(
                self.device_window_pages // self.low_share if low_window is None else low_window
            ),
            dense_pages=self.dense_pages,
            host_is_ample=self.host_is_ample,
        )
