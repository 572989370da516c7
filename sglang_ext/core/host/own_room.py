"""Room on the host inside a quota: what of a namespace gives way to other pages of it."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.candidates import Kind
from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.host.own_victims import OwnVictims
from sglang_ext.core.host.quotas import Quotas
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows

_NOBODY = -1
_LOOKED_AT_A_STEP = 1 << 12
"""Rows of the table that a step looks at when a namespace that has pages has got a quota."""
_DROPPED_A_STEP = 16
"""Windows, with the pages that lead to nothing else, or as many groups of useless pages."""
_PAGES_AT_ONCE = 64
_STEPS_AFTER_A_REFUSAL = 16
"""So long pages that the rest of their namespace is worth more than are left alone, and so is a
namespace of which all is in use or pinned."""
EVERYTHING = float("inf")


@dataclasses.dataclass(slots=True, eq=False)
class _Own:
    """A namespace with a quota.

    Attributes:
        number: by which its pages are marked.
        looked_at: rows of the table, from the first one on, of which ``victims`` knows.
        refused: steps for which no copy of its pages is tried ahead of their eviction.
        rests: steps until it is tried again whether something may go that could not.
    """

    number: int
    victims: OwnVictims
    looked_at: int
    refused: int = 0
    rests: int = 0

    def look_on(self, rows: int) -> None:
        """So many rows of the table have been looked at."""
        self.looked_at = rows

    def refuse(self, steps: int) -> None:
        """Try no copies for so many steps."""
        self.refused = steps

    def rest(self, steps: int) -> None:
        """Drop nothing for so many steps."""
        self.rests = steps


@dataclasses.dataclass(slots=True)
class _Held:
    """Ends of windows that would go and are in use."""

    superseded: list[int] = dataclasses.field(default_factory=list)
    tails: list[int] = dataclasses.field(default_factory=list)


class OwnRoom:
    """Keeps namespaces within their quotas. A namespace that is at its quota gets room from its
    own pages alone; others lose nothing for it.

    What goes first: windows that are kept because there was room; copies that lead to no window;
    windows inside prompts that others make up for; then the ends of those prefixes that are worth
    least. Copies of what is on the device too are pages like others: a namespace at its quota
    would make them again each time.

    Without quotas nothing is kept here, and nobody is asked anything.
    """

    def __init__(self, residency: Residency, quotas: Quotas) -> None:
        self._residency = residency
        self._table = residency.table
        self._kept = residency.kept
        self._candidates = residency.candidates
        self._counters = residency.counters
        self._quotas = quotas
        # bytes that storage is to bring
        self._coming: dict[Hashable, int] = {}
        self._dropped_copies = False
        self._owns: dict[Hashable, _Own] = {}
        self._numbers: dict[int, _Own] = {}
        for namespace in quotas.bounds:
            self._begin(namespace, residency.table.capacity)  # there are no pages yet

    # ---- quotas --------------------------------------------------------------

    def set(self, namespace: Hashable, bound: int) -> None:
        """A namespace may have so many bytes; what it has beyond goes in the steps that come."""
        self._quotas.set(namespace, bound)
        if (own := self._owns.get(namespace)) is not None:
            own.rest(0)
            return
        has_pages = self._table.root(namespace) is not None
        self._begin(namespace, 0 if has_pages else self._table.capacity)

    def clear(self, namespace: Hashable) -> bool:
        """A namespace has no quota any more; whether it had one."""
        if (own := self._owns.pop(namespace, None)) is not None:
            self._listed[own.victims.rows] = _NOBODY
            del self._numbers[own.number]
            self._seen = -1
            if not self._owns:
                self._candidates.tell_looked(None)
        return self._quotas.clear(namespace)

    def _begin(self, namespace: Hashable, looked_at: int) -> None:
        if not self._owns:
            rows = self._table.capacity
            # the number of who lists each row, and of who has each namespace
            self._listed = np.full(rows, _NOBODY, dtype=np.int32)
            self._who = np.full(rows, _NOBODY, dtype=np.int32)
            self._known: list[int] = []
            self._candidates.tell_looked(self._looked)
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        victims = OwnVictims(self._table, self._kept, self._candidates)
        self._owns[namespace] = self._numbers[number] = _Own(number, victims, looked_at)
        # changes of the table's namespaces that ``_who`` has
        self._seen = -1

    @property
    def is_on(self) -> bool:
        """Whether there are quotas."""
        return bool(self._owns)

    def used(self, namespace: Hashable) -> int:
        """Bytes that a namespace has on the host, with those that storage brings."""
        number = self._table.namespaces.number_of(namespace)
        there = 0 if number is None else self._quotas.bytes_of(*self._candidates.held(number))
        return there + self._coming.get(namespace, 0)

    def used_at_last_look(self, namespace: Hashable) -> int:
        """The same, see ``Candidates.held_at_last_look``."""
        number = self._table.namespaces.number_of(namespace)
        held = (0, 0) if number is None else self._candidates.held_at_last_look(number)
        return self._quotas.bytes_of(*held) + self._coming.get(namespace, 0)

    def is_settled(self, namespace: Hashable) -> bool:
        """Whether a namespace has no more than its quota, or nothing that could go now."""
        own = self._owns.get(namespace)
        if own is None or self._missing(namespace) <= 0:
            return True
        return own.rests > 0

    def _missing(self, namespace: Hashable, size: int = 0) -> int:
        """Bytes that are too many with ``size`` more."""
        return self.used(namespace) + size - self._quotas.bounds[namespace]

    # ---- what has changed ----------------------------------------------------

    def expect(self, namespace: Hashable, pages: int, windows: int) -> None:
        """Storage brings so many pages for a namespace; with negative numbers, it has."""
        coming = self._coming.pop(namespace, 0) + self._quotas.bytes_of(pages, windows)
        if coming:
            self._coming[namespace] = coming

    def _looked(self, rows: Rows) -> None:
        """Pages have been looked at: those that may go are listed with their namespace."""
        rows, kept = np.unique(rows), self._kept
        who = self._owners(rows)
        may_go = kept.ends[rows] & (kept.below[rows] == 1)
        for kind in (Kind.USELESS, Kind.SUPERSEDED):
            may_go |= self._candidates.is_in(rows, kind)
        who[~may_go] = _NOBODY
        before = self._listed[rows]
        left = (before != who) & (before != _NOBODY)
        for number in np.unique(before[left]).tolist():
            self._numbers[number].victims.forget(rows[left & (before == number)])
        for number in np.unique(who[who != _NOBODY]).tolist():
            self._numbers[number].victims.look(rows[who == number])
        self._listed[rows] = who

    def _owners(self, rows: Rows) -> NDArray[np.int32]:
        """Who has the namespaces that pages belong to."""
        namespaces = self._table.namespaces
        if namespaces.changes != self._seen:
            self._seen = namespaces.changes
            self._who[self._known] = _NOBODY
            named = ((namespaces.number_of(name), own) for name, own in self._owns.items())
            known = {number: own.number for number, own in named if number is not None}
            self._known = list(known)
            self._who[self._known] = list(known.values())
        who: NDArray[np.int32] = self._who[self._table.space[rows]]
        who[self._table.parent[rows] == FREE] = _NOBODY
        return who

    # ---- room ----------------------------------------------------------------

    def left(
        self, namespace: Hashable, number: int, pages: int, limit: float | None, *, windows: int = 0
    ) -> int:
        """Of so many pages of a component those that a namespace may have yet, after its own have
        given way as far as possible.

        Args:
            number: of the component; 0 for full attention.
            limit: what is worth less may go; with None what was kept because there was room.
            windows: that it is to get beside them.
        """
        if namespace not in self._owns:
            return pages
        size, beside = self._quotas.page_bytes[number], self._quotas.bytes_of(0, windows)
        self._make(namespace, pages * size + beside, limit)
        most = -self._missing(namespace, beside)
        if most < 0:
            return 0
        return min(pages, most // size) if size else pages

    def admits(self, namespace: Hashable, pages: int, windows: int) -> bool:
        """Whether a namespace may have so many more pages, that somebody waits for."""
        if namespace not in self._owns:
            return True
        size = self._quotas.bytes_of(pages, windows)
        self._make(namespace, size, EVERYTHING)
        return self._missing(namespace, size) <= 0

    def windows_left(self, namespace: Hashable, most: int) -> int:
        """How many windows' pages a namespace may have yet without a loss; ``most`` if more."""
        size = self._quotas.page_bytes[1]
        if namespace not in self._owns or size == 0:
            return most
        return max(0, min(most, -self._missing(namespace) // size))

    def has_more_than_is_taken(self, namespace: Hashable) -> bool:
        """Whether a namespace has less than half of its quota, or none."""
        if namespace not in self._owns:
            return True
        return 2 * self.used(namespace) <= self._quotas.bounds[namespace]

    def _make(self, namespace: Hashable, size: int, limit: float | None) -> None:
        """Drop pages of a namespace until it may have ``size`` bytes more, or nothing else may
        go."""
        own = self._owns[namespace]
        if self._missing(namespace, size) > 0 and own.looked_at == self._table.capacity:
            self._drop(namespace, size, limit, self._table.capacity)

    def step(self) -> None:
        """Once a step: what namespaces have beyond their quotas goes, some of it each time."""
        rows = self._table.capacity
        for namespace, own in self._owns.items():
            self._candidates.look_at_tails()
            if own.looked_at < rows:
                end = min(rows, own.looked_at + _LOOKED_AT_A_STEP)
                self._looked(np.arange(own.looked_at, end))
                own.look_on(end)
            if own.refused:
                own.refuse(own.refused - 1)
            if own.rests:
                own.rest(own.rests - 1)
            elif own.looked_at == rows and self._missing(namespace) > 0:
                dropped = self._drop(namespace, 0, EVERYTHING, _DROPPED_A_STEP)
                own.rest(0 if dropped else _STEPS_AFTER_A_REFUSAL)

    def _drop(self, namespace: Hashable, size: int, limit: float | None, most: int) -> int:
        """Drop ``most`` things of a namespace, or until it may have ``size`` bytes more; how many
        have gone."""
        victims, held, left = self._owns[namespace].victims, _Held(), most
        copies = self._candidates.on_both_tiers()
        for drop in self._stages(namespace, size, limit, held):
            while left and self._missing(namespace, size) > 0 and drop():
                left -= 1
        victims.put_back(held.superseded, held.tails)
        self._dropped_copies |= self._candidates.on_both_tiers() < copies
        return most - left

    def _stages(
        self, namespace: Hashable, size: int, limit: float | None, held: _Held
    ) -> Iterator[Callable[[], bool]]:
        """What gives way, one after the other; each drops one thing, or nothing else is left.

        Args:
            held: for what cannot go now.
        """
        victims = self._owns[namespace].victims
        spare = iter(self._spare(namespace))
        yield lambda: self._drop_spare(spare)
        if limit is None:
            return
        if self._quotas.page_bytes[0]:
            yield lambda: self._drop_useless(victims, self._missing(namespace, size))
        yield lambda: self._drop_superseded(victims, held)
        yield lambda: self._drop_tail(victims, limit, held)
        if limit == EVERYTHING:
            yield lambda: self._drop_inside_pinned(namespace)

    def _spare(self, namespace: Hashable) -> list[int]:
        """Ends of windows of a namespace that are kept because there was room, those first that
        were not used for longest."""
        if not self._kept.beyond:
            return []
        ends = self._kept.spare()
        ends = ends[self._table.space[ends] == self._table.namespaces.number_of(namespace)]
        order = np.argsort(self._table.last_use(ends), kind="stable")
        spare: list[int] = ends[order].tolist()
        return spare

    def _drop_spare(self, spare: Iterator[int]) -> bool:
        for end in spare:
            if self._frees(end):
                self._forget_window(end)
                return True
        return False

    def _frees(self, end: int) -> bool:
        """Whether a kept window is not in use, and has pages that no other one needs."""
        windows = self._kept.windows(np.array([end]))
        own = (windows >= 0) & (self._kept.uses[windows] == 1)
        return bool(own.any() and not self._residency.are_in_use(windows)[0])

    def _forget_window(self, end: int) -> None:
        self._counters.evicted_host_window_pages += self._residency.forget_window(end)

    def _drop_useless(self, victims: OwnVictims, missing: int) -> bool:
        self._candidates.look_at_tails()
        pages = -(-missing // self._quotas.page_bytes[0])
        rows = victims.take_useless(min(pages, _PAGES_AT_ONCE))
        self._drop_copies(rows)
        return len(rows) > 0

    def _drop_copies(self, rows: Rows) -> None:
        """Drop copies of what is on the device too."""
        if len(rows):
            self._residency.host.drop(rows)
            self._counters.reclaimed_duplicate_pages += len(rows)

    def _drop_superseded(self, victims: OwnVictims, held: _Held) -> bool:
        self._candidates.look_at_tails()
        while (end := victims.take_superseded()) is not None:
            if self._frees(end):
                self._forget_window(end)
                return True
            held.superseded.append(end)
        return False

    def _drop_tail(self, victims: OwnVictims, limit: float, held: _Held) -> bool:
        """Drop the last window of the prefix that is worth least, and the pages that led to
        nothing else. Nothing that the host as a whole goes by learns of it: it has room."""
        self._candidates.look_at_tails()
        for end in victims.tails.rising(limit, []):
            if self._candidates.tail_is_held(end):
                held.tails.append(end)
                continue
            tail = self._residency.forget_tail(end)
            self._residency.host_window.drop(tail.windows)
            self._drop_copies(tail.copies)
            self._counters.evicted_host_window_pages += len(tail.windows)
            self._counters.evicted_host_pages += len(tail.lost)
            self._residency.remove(tail.lost)
            return True
        return False

    def _drop_inside_pinned(self, namespace: Hashable) -> bool:
        """Drop a window inside a pinned prefix, which needs its last one alone."""
        pinned, table = self._candidates.tails.pinned, self._table
        number = table.namespaces.number_of(namespace)
        for end in sorted(pinned):
            if table.parent[end] == FREE or table.space[end] != number:
                continue
            path = table.path(end)[:-1]
            for row in path[self._kept.ends[path]].tolist():
                if row not in pinned and self._frees(row):
                    self._forget_window(row)
                    return True
        return False

    # ---- copies ahead of eviction --------------------------------------------

    def refuse(self, namespace: Hashable) -> None:
        """A namespace has no room for a copy that was due: its pages take no time, and not the
        turn of others, for some steps."""
        if (own := self._owns.get(namespace)) is not None:
            own.refuse(_STEPS_AFTER_A_REFUSAL)

    def passes_over(self, rows: Rows) -> NDArray[np.bool_]:
        """Pages of namespaces that were refused."""
        numbers = [
            self._table.namespaces.number_of(namespace)
            for namespace, own in self._owns.items()
            if own.refused
        ]
        flags: NDArray[np.bool_] = np.isin(
            self._table.space[rows], [number for number in numbers if number is not None]
        )
        return flags

    def take_dropped(self) -> bool:
        """Whether copies of what is on the device too were dropped since somebody asked."""
        dropped, self._dropped_copies = self._dropped_copies, False
        return dropped

    # ---- for tests -----------------------------------------------------------

    def listed(self) -> dict[Hashable, dict[str, list[int]]]:
        """What may go of each namespace of which all rows have been looked at."""
        self._candidates.look_at_tails()
        whole = self._table.capacity
        return {
            name: own.victims.listed() for name, own in self._owns.items() if own.looked_at == whole
        }

    def private_state(self) -> list[int]:
        """Numbers that decisions depend on; for ``fingerprint``. None without quotas."""
        if not self._owns:
            return []
        state = [int(self._dropped_copies)]
        for namespace, own in self._owns.items():
            coming = self._coming.get(namespace, 0)
            bound = self._quotas.bounds[namespace]
            state += (bound, own.looked_at, own.refused, own.rests, coming)
        return state
