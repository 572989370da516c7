"""What room on the host may not cost: copies that are needed before what it is for, and what is to
go after something else."""

from collections.abc import Callable

import numpy as np

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.host.room import Claim, Freed
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.table.columns import Rows
from sglang_ext.testing.model_page import READY, Key, ModelPage, States, page_order
from sglang_ext.testing.watch import require


class RoomRules:
    """Rules of the host of an index.

    Args:
        worth: what a row is worth to the host; the sum is what claims have.
    """

    def __init__(self, index: PrefixCache, worth: Callable[[int], tuple[int, float]]) -> None:
        self._index = index
        self._table, self._kept = index.table, index.kept
        self._worth = worth

    def watch(
        self, make: Callable[..., Freed], space: HostSpace, pages: int, claim: Claim
    ) -> Freed:
        """Copies of what is on the device too stay if they are older than the claim: two that are
        as old would take each other's place forever. But those that no kept window needs any more,
        and windows that others make up for, go at any age.

        Where copies stay (see ``HostRoom``), both go only when there is nothing on the host alone
        that is to go before them.
        """
        table, kept = self._table, self._kept
        copies = table.device.ready & table.host.ready
        ends = np.flatnonzero(kept.ends & table.resume)
        windows = ends[[self._is_on_device(row) for row in ends.tolist()]]
        first = self._goes_first(claim) if self._index.room.copies_stay else set()
        freed = make(space, pages, claim)
        gone = np.flatnonzero(copies & ~table.host.present & (kept.below > 0))
        gone_windows = windows[~kept.ends[windows]]
        both = np.concatenate((gone, gone_windows))
        require(bool((table.age[gone] > claim.age).all()), "room cost a copy of an older page")
        younger = table.age[gone_windows] > claim.age
        require(bool(younger.all()), "room cost a copy of an older window")
        left = first & self._goes_first(claim) if len(both) else set()
        require(not left, "a copy went before a prefix that is worth less")
        return freed

    def _is_on_device(self, end: int) -> bool:
        return bool(self._table.swa_device.ready[self._window(end)].all())

    def _window(self, end: int) -> Rows:
        return self._table.path(end)[-self._table.geometry.window_pages :]

    def _goes_first(self, claim: Claim) -> set[int]:
        """Ends of windows that others make up for and that hold pages for themselves, and of the
        last windows of prefixes on the host alone that are worth less than a claim; those that
        nobody uses. Prefixes of one class go in the order of their use, so one that is worth as
        much as the claim keeps those behind it."""
        table, kept, found = self._table, self._kept, set[int]()
        ends = np.flatnonzero(kept.ends)
        for end in ends[(kept.below[ends] > 1) & ~table.resume[ends]].tolist():
            window = self._window(end)
            in_use = table.swa_host.locks[held_with(self._index, window)].any()
            if not in_use and (kept.uses[window] == 1).any():
                found.add(end)
        pinned, full = self._index.residency.candidates.tails.pinned, set[int]()
        tails = [end for end in ends[kept.below[ends] == 1].tolist() if end not in pinned]
        for end in sorted(tails, key=lambda row: (table.used[row], row)):
            kind = int(table.kind[end])
            if sum(self._worth(end)) >= claim.worth:
                full.add(kind)
            elif kind not in full and not self._stays(end):
                found.add(end)
        return found

    def _stays(self, end: int) -> bool:
        """Whether the last window of a prefix cannot go now: a transfer or a pin has pages that it
        needs alone, or goes on from what would be lost with it, or it is on the device too."""
        table, path, window = self._table, self._table.path(end), self._window(end)
        alone = path[(self._kept.below[path] == 1) & ~table.device.present[path]]
        own = held_with(self._index, window)
        held = table.swa_host.locks[own].any() or table.host.locks[alone].any()
        return bool(held) or self._is_on_device(end)


def held_with(index: PrefixCache, window: Rows) -> Rows:
    """Pages of a kept window that it cannot go without when somebody holds them: not those that a
    pin and another window have too, as they stay with that one."""
    pinned = np.isin(window, index.pins.locks()[1])
    return window[~(pinned & (index.kept.uses[window] > 1))]


def duplicates(
    states: States, pages: dict[Key, ModelPage], held: set[Key], younger_than: ModelPage
) -> set[Key]:
    """Host copies that a backup should have taken first.

    Args:
        held: those that it must not take.
        younger_than: the youngest page that it copies.
    """
    above = set[Key]()
    for key, state in states.items():
        if state[1] and not state[0]:
            parent = pages[key].parent
            while parent is not None and parent not in above:
                above.add(parent)
                parent = pages[parent].parent
    return {
        key
        for key, state in states.items()
        if state[0] == READY
        and state[1] == READY
        and key not in above | held
        and page_order(pages[key]) > page_order(younger_than)
    }
