"""Values that cross the border of the core: matches, transfers, refusals."""

import dataclasses
import enum
from typing import NamedTuple

from sglang_ext.core.table.columns import Rows, SlotColumn, Slots


class DeclineReason(enum.Enum):
    """Why a transfer was not started. Each is an expected answer, never an error."""

    HOST_FULL = "host_full"
    HOST_WINDOW_FULL = "host_window_full"
    DEVICE_FULL = "device_full"
    BACKLOG = "backlog"
    STALE = "stale"
    STORAGE_BACKLOG = "storage_backlog"
    QUOTA = "quota"


@dataclasses.dataclass(frozen=True, slots=True)
class Declined:
    """An expected no."""

    reason: DeclineReason


class PrefixMatch(NamedTuple):
    """The best point at which a request can resume.

    Attributes:
        rows: path of the resume point, first page first. Every page has full
            KV on some tier, and the last window sliding-window KV on some tier.
        device_pages: pages of a resume point that needs no load; at most
            ``len(rows)``.
        window_pages_to_pin: sliding-window pages that a load to ``rows`` turns
            from free or evictable into protected. An upper bound.
        behind: cached pages of the prompt after the resume point: computed again for
            want of a window.
        cut: tokens at the end of the last page of ``rows`` that are not the prompt's: the
            request resumes inside that page. 0 if ``device_pages`` is less.
    """

    rows: Rows
    device_pages: int
    window_pages_to_pin: int
    behind: int = 0
    cut: int = 0


class Hold:
    """Locks taken together, to be released exactly once."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: tuple[SlotColumn, Rows]) -> None:
        for column, rows in parts:
            column.lock(rows)
        self._parts: tuple[tuple[SlotColumn, Rows], ...] | None = parts

    def release(self) -> None:
        """Drop the locks."""
        assert self._parts is not None, "hold released twice"
        for column, rows in self._parts:
            column.unlock(rows)
        self._parts = None


class TransferKind(enum.Enum):
    """Direction of a transfer."""

    BACKUP = "backup"
    LOAD = "load"


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """Pages of one component to copy between tiers.

    Attributes:
        rows: table rows, for the commit.
        device: (n, slots_per_page) device slots.
        host: (n, slots_per_page) host slots.
    """

    rows: Rows
    device: Slots
    host: Slots

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(slots=True)
class Transfer:
    """A begun transfer: slots reserved, rows held. Ends with exactly one commit.

    Attributes:
        op: number of the operation, counted separately for each direction; commits
            happen in this order on every rank.
        path: rows whose device pages ``hold`` locks.
        stops: pages of ``path`` before each resume point whose window is on the host after
            the commit; of a backup.
        spare: those of them that are kept only because there is room.
        failed_here: this rank has no host slots for it. It is not copied, and every
            rank commits it as failed.
        abandoned: eviction took its pages back. Its host slots are no longer in the
            table; the copy may still write them, so they are free after the commit.
    """

    op: int
    kind: TransferKind
    full: Copies
    window: Copies
    hold: Hold
    path: Rows
    stops: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    failed_here: bool = False
    abandoned: bool = False

    def abandon(self) -> None:
        """It is given up, and never published."""
        self.abandoned = True
