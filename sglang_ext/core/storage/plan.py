"""Values that cross the border to storage: what is looked for, read and written."""

import dataclasses
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.storage.keys import Key
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.digest import Pages

LOOKUPS_A_STEP = 32
"""Prefetches that can be decided in one step: each has its own elements in the report."""
PREFETCHES = 64
"""Prefetches that may read at the same time."""
PERSISTS = 64
"""Persists that may write at the same time."""


@dataclasses.dataclass(frozen=True, slots=True)
class StorageLimits:
    """How much of the host memory a storage tier may hold up; in table pages.

    Attributes:
        threshold_pages: a prefetch of fewer pages is not worth it.
        stop_pages: least distance of the windows that a prefetch brings along, so that a part
            of it is of use.
        dense_pages: distance of the windows inside a prompt that are written, as far as the
            host has them: a prompt whose end has given way is of use up to one of these. 0
            writes none of those that the host keeps only while it has room.
        prefetch_pages: pages that prefetches fill at a time.
        persist_pages: pages that storage reads at a time.
    """

    threshold_pages: int
    stop_pages: int
    prefetch_pages: int
    persist_pages: int
    dense_pages: int = 0

    @classmethod
    def for_host(
        cls, pages: int, threshold_pages: int, stop_pages: int, dense_pages: int = 0
    ) -> "StorageLimits":
        """Half of the host for what comes, an eighth for what goes."""
        return cls(
            threshold_pages=max(1, threshold_pages),
            stop_pages=max(1, stop_pages),
            prefetch_pages=max(1, pages // 2),
            persist_pages=max(1, pages // 8),
            dense_pages=dense_pages,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Objects:
    """Pages of one component, as storage knows them.

    Attributes:
        keys: one for each slot.
        slots: (n, slots_per_page) host slots.
    """

    keys: list[Key]
    slots: Slots

    def __len__(self) -> int:
        return len(self.slots)


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """Rows and what they were when they were held."""

    rows: Rows
    generations: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class Persist:
    """Host pages that storage writes: full-attention pages in the order of the path, then
    windows. Ends with exactly one commit.

    Attributes:
        op: number of the operation; they end in this order.
        keys: of all pages from the first one of the prompt on.
        first: so many keys are in front of the first page to write.
        windows: places in ``keys`` of the window pages to write, and of those that are used
            with the path.
        path: all pages from the first one of the prompt on.
    """

    op: int
    full: Objects
    window: Objects
    keys: list[Key]
    first: int
    windows: frozenset[int]
    path: Held
    full_rows: Held
    window_rows: Held

    @property
    def before(self) -> Key | None:
        """Key of the page in front of the first one, which must be in storage; None: none is."""
        return self.keys[self.first - 1] if self.first else None


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Part of a prefetch that is of use without what follows: pages up to a resume point,
    and its window."""

    full: Objects
    window: Objects


@dataclasses.dataclass(slots=True)
class Prefetch:
    """Pages of a prompt that storage may have. First looked up, then read.

    Boundaries are in table pages from the beginning of the prompt.

    Attributes:
        op: number of the operation, in the order they were begun.
        known: pages ``[0, known)`` of the prompt were in the table.
        resume: the prompt could be resumed here without storage.
        first: keys begin with this page.
        above: keys of the device pages of pages ``[0, first)``.
        keys: of the device pages of pages ``[first, limit)``.
        limit: there is no host room for pages beyond.
        stops: resume points that are read, ascending.
        stages: what is read for each of them.
        published: stages that are in the table.
        cancelled: nobody waits for it any more.
        failed_here: this rank has no host slots for it.
        asks_only: it ends with the lookup, and ``stops`` are what was found.
    """

    op: int
    pages: Pages
    namespace: Hashable
    known: int
    resume: int
    first: int
    above: list[Key]
    keys: list[Key]
    limit: int
    stops: tuple[int, ...] = ()
    stages: tuple[Stage, ...] = ()
    published: int = 0
    cancelled: bool = False
    failed_here: bool = False
    asks_only: bool = False

    def answer(self, stops: tuple[int, ...]) -> None:
        """It has been looked for, and is over."""
        self.stops, self.cancelled = stops, True

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True

    def reserve(
        self, stops: tuple[int, ...], known: int, stages: tuple[Stage, ...], *, done: bool
    ) -> None:
        """There are host slots for what is read: see the attributes.

        Args:
            done: on this rank, too.
        """
        self.stops, self.known, self.stages = stops, known, stages
        self.failed_here = not done

    def note_published(self) -> None:
        """The next stage is in the table."""
        self.published += 1

    def keys_up_to(self, stop: int, per_page: int) -> list[Key]:
        """Keys of the device pages of pages ``[0, stop)``, ``per_page`` for each."""
        return self.above + self.keys[: (stop - self.first) * per_page]

    @property
    def end(self) -> int:
        """The resume point that has been reached so far."""
        return self.stops[self.published - 1] if self.published else self.resume
