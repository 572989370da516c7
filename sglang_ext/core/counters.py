"""What happened, counted. Plain numbers; the adapter turns them into metrics."""

import collections
import dataclasses
import enum

from sglang_ext.core.plan import Declined, DeclineReason


class Unfulfilled(enum.Enum):
    """Why a request did not get pages that storage had."""

    STALE = "stale"
    BACKLOG = "backlog"
    HOST_FULL = "host_full"
    LATE = "late"
    UNREAD = "unread"


@dataclasses.dataclass(slots=True)
class Counters:
    """Pages are table pages; ``window`` means sliding-window copies.

    Attributes:
        unsaved_pages: left the device and had no copy on the host.
        found_pages: storage had them for a request that waited; ``unfulfilled`` are those of
            them that the request did not get, by reason.
    """

    backed_up_pages: int = 0
    backed_up_window_pages: int = 0
    loaded_pages: int = 0
    loaded_window_pages: int = 0
    persisted_pages: int = 0
    persisted_window_pages: int = 0
    unpersisted_pages: int = 0
    found_pages: int = 0
    prefetched_pages: int = 0
    prefetched_window_pages: int = 0
    lost_prefetched_pages: int = 0
    cancelled_prefetches: int = 0
    demoted_pages: int = 0
    dropped_pages: int = 0
    dropped_window_pages: int = 0
    unsaved_pages: int = 0
    evicted_host_pages: int = 0
    evicted_host_window_pages: int = 0
    moved_host_pages: int = 0
    reclaimed_duplicate_pages: int = 0
    reclaimed_duplicate_window_pages: int = 0
    abandoned_transfers: int = 0
    failed_transfers: int = 0
    collisions: int = 0
    copied_inside: int = 0
    inadmissible: int = 0
    declined: collections.Counter[DeclineReason] = dataclasses.field(
        default_factory=collections.Counter
    )
    unfulfilled: collections.Counter[Unfulfilled] = dataclasses.field(
        default_factory=collections.Counter
    )

    def decline(self, reason: DeclineReason) -> Declined:
        """Count a refusal."""
        self.declined[reason] += 1
        return Declined(reason)

    def as_dict(self) -> dict[str, int]:
        """Flat name to number; refusals as ``declined_<reason>``, pages of storage that were not
        used as ``unfulfilled_<reason>``."""
        numbers = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("declined", "unfulfilled")
        }
        for reason in DeclineReason:
            numbers[f"declined_{reason.value}"] = self.declined[reason]
        for why in Unfulfilled:
            numbers[f"unfulfilled_{why.value}"] = self.unfulfilled[why]
        return numbers
