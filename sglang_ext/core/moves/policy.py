"""What is backed up when, and how much of the device that may hold up."""

import dataclasses

from sglang_ext.core.write_policy import WritePolicy

_PINNED_SHARE = 2
"""Backups in flight may pin one in this many device pages."""
_LOW_SHARE = 4
"""Pages are copied ahead of eviction up to one in this many device pages."""
_AHEAD_SHARE = 12
"""And not more than one in this many host pages,"""
_MOST_AHEAD_SHARE = 4
"""or, where single steps take more, in this many of those that the device would not fill."""
_AMPLE_SHARE = 8
"""A host of so many times the device has room for all of it a second time."""


@dataclasses.dataclass(frozen=True, slots=True)
class BackupPolicy:
    """What is backed up when, and how much of the device that may hold up.

    Attributes:
        write: when a page is copied to the host.
        checkpoint_pages: distance of the windows kept inside a prompt; 0 keeps none there.
        dense_pages: the same while the host has free room; 0 keeps no more then.
        window_cost: pages of full attention that take as many bytes as a window.
        pinned_pages: device pages that pending backups may copy. The paths that lead to these
            are held as well, until the copies have been made.
        pinned_window_pages: the same for sliding-window copies.
        low_pages: device pages, free ones included, that eviction shall be able to free
            before it meets one without a host copy; made good when a third of them are used.
        low_window_pages: the same for sliding-window copies.
        most_low_pages: where single steps take more than that, they are as many as this.
        step_pages: what a step is taken to need before any was seen.
        host_is_ample: whether what is on both tiers takes a small part of the host.
    """

    write: WritePolicy
    checkpoint_pages: int
    pinned_pages: int
    pinned_window_pages: int
    low_pages: int
    low_window_pages: int
    most_low_pages: int = 0
    step_pages: int = 0
    dense_pages: int = 0
    window_cost: int = 0
    host_is_ample: bool = False

    @classmethod
    def for_device(
        cls,
        write: WritePolicy,
        checkpoint_pages: int,
        pages: int,
        window_pages: int,
        host_pages: int,
        dense_pages: int = 0,
        step_pages: int = 0,
        window_cost: int = 0,
    ) -> "BackupPolicy":
        """What a server with so many device pages of each component runs with.

        Args:
            host_pages: full-attention pages that the host has room for.
            step_pages: most that a step prefills.
        """
        # what is copied ahead is in both tiers at once
        ahead = host_pages // _AHEAD_SHARE
        return cls(
            write=write,
            checkpoint_pages=checkpoint_pages,
            pinned_pages=pages // _PINNED_SHARE,
            pinned_window_pages=window_pages // _PINNED_SHARE,
            low_pages=min(pages // _LOW_SHARE, ahead),
            low_window_pages=min(window_pages // _LOW_SHARE, ahead),
            most_low_pages=min(pages // _PINNED_SHARE, (host_pages - pages) // _MOST_AHEAD_SHARE),
            dense_pages=dense_pages,
            window_cost=window_cost,
            host_is_ample=host_pages >= _AMPLE_SHARE * pages,
            # other policies have made their copies by then
            step_pages=max(0, step_pages) if write is WritePolicy.WRITE_BACK else 0,
        )
