"""What happened, counted. Plain numbers; the adapter turns them into metrics."""

import collections
import dataclasses
import enum
import operator

from sglang_ext.core.plan import Declined, DeclineReason


class Unfulfilled(enum.Enum):
    """Why a request did not get pages that storage had."""

    STALE = "stale"
    BACKLOG = "backlog"
    HOST_FULL = "host_full"
    QUOTA = "quota"
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
    unpersisted_window_pages: int = 0
    found_pages: int = 0
    prefetched_pages: int = 0
    prefetched_window_pages: int = 0
    lost_prefetched_pages: int = 0
    lost_prefetched_window_pages: int = 0
    cancelled_prefetches: int = 0
    demoted_pages: int = 0
    dropped_pages: int = 0
    dropped_window_pages: int = 0
    unsaved_pages: int = 0
    evicted_host_pages: int = 0
    evicted_host_window_pages: int = 0
    moved_host_pages: int = 0
    moved_host_window_pages: int = 0
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

    def total(self) -> int:
        """The sum of all of them. None ever falls for long, so it tells whether one has changed,
        and takes less time than ``numbers``."""
        plain: int = sum(_PLAIN(self))
        return plain + self.declined.total() + self.unfulfilled.total()

    def numbers(self) -> tuple[int, ...]:
        """All of them, in the order of ``NAMES``."""
        declined, unfulfilled = self.declined, self.unfulfilled
        return (
            *_PLAIN(self),
            # with ``get``: a Counter asks a method of its own for what it has not
            *[declined.get(reason, 0) for reason in DeclineReason],
            *[unfulfilled.get(why, 0) for why in Unfulfilled],
        )

    def as_dict(self) -> dict[str, int]:
        """Flat name to number."""
        return dict(zip(NAMES, self.numbers(), strict=True))


_FIELDS = [
    field.name
    for field in dataclasses.fields(Counters)
    if field.name not in ("declined", "unfulfilled")
]
_PLAIN = operator.attrgetter(*_FIELDS)
NAMES = (
    *_FIELDS,
    *(f"declined_{reason.value}" for reason in DeclineReason),
    *(f"unfulfilled_{why.value}" for why in Unfulfilled),
)
"""Of all numbers: refusals as ``declined_<reason>``, pages of storage that were not used as
``unfulfilled_<reason>``."""
