"""What storage has done: what a rank reports, what all ranks do about it.

As in ``core.moves.ledger``, the element-wise minimum over ranks is what all ranks apply. A resume
point must be in every rank's storage, so a lookup is decided by repetition: each rank names its
deepest resume point up to the smallest one named so far, until all name the same.
"""

from collections.abc import Sequence
from itertools import islice

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.storage.plan import LOOKUPS_A_STEP, PERSISTS, PREFETCHES, Persist, Prefetch

_NOT_YET = -1


class StorageLedger:
    """Lookups, prefetches and persists of one rank, in the order in which they were begun.

    Attributes:
        now_ms: a clock that shows the same on every rank: the slowest one's.
    """

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        self.now_ms = 0
        self.reset()

    def reset(self) -> None:
        """Nothing is in flight."""
        self._persisted: dict[int, int] = {}
        self._found: dict[int, list[int]] = {}
        self._bound: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._over: set[int] = set()

    # ---- what has happened here ----------------------------------------------

    def persisted(self, op: int, pages: int) -> None:
        """A persist has ended; so many of its pages, from the first one on, are stored."""
        self._persisted[op] = pages

    def found(self, op: int, stops: list[int]) -> None:
        """A lookup has ended: resume points in storage, in table pages, ascending."""
        if op in self._index.prefetches.lookups:
            self._found[op] = stops

    def read(self, op: int, stages: int) -> None:
        """So many stages of a prefetch have been read."""
        self._read[op] = stages

    def over(self, op: int) -> None:
        """Nothing of a prefetch is read here any more."""
        self._over.add(op)

    # ---- agreement -----------------------------------------------------------

    def report(self, now_ms: int) -> list[int]:
        """This rank's view, of the same length on every rank."""
        report = [now_ms]
        report += _padded([self._persisted.get(op, _NOT_YET) for op in self._persists()], PERSISTS)
        for prefetch in self._lookups():
            report += self._answer(prefetch)
        report += [_NOT_YET] * (1 + PERSISTS + 4 * LOOKUPS_A_STEP - len(report))
        prefetches = self._prefetches()
        report += _padded([self._read.get(op, 0) for op in prefetches], PREFETCHES)
        report += _padded([int(op in self._over) for op in prefetches], PREFETCHES)
        return report

    def _answer(self, prefetch: Prefetch) -> list[int]:
        """(x, -x, y, -y): x is 1 + the resume point named, 0 before the lookup has ended; y
        identifies all that were found."""
        found = self._found.get(prefetch.op)
        if found is None:
            return [0, 0, 0, 0]
        bound = self._bound.get(prefetch.op, prefetch.limit)
        named = 1 + self._index.prefetches.candidate(prefetch, found, bound)
        mark = hash(tuple(found)) >> 2
        return [named, -named, mark, -mark]

    def commit(self, agreed: Sequence[int]) -> list[Prefetch]:
        """Apply the minimum of all reports; returns the prefetches to read now."""
        self.now_ms = max(self.now_ms, agreed[0])
        persists, rest = agreed[1 : 1 + PERSISTS], agreed[1 + PERSISTS :]
        answers, rest = rest[: 4 * LOOKUPS_A_STEP], rest[4 * LOOKUPS_A_STEP :]
        # the lists of the report: taken before anything changes
        writing, looking, reading = self._persists(), self._lookups(), self._prefetches()
        for op, pages in zip(writing, persists, strict=False):
            if pages == _NOT_YET:
                break
            self._index.persists.commit(op, pages, self.now_ms)
            self._persisted.pop(op)
        for op, stages, over in zip(reading, rest[:PREFETCHES], rest[PREFETCHES:], strict=False):
            self._index.prefetches.publish(op, stages)
            if over:
                self._index.prefetches.end(op)
                self._read.pop(op, None)
                self._over.discard(op)
        begun = []
        for number, prefetch in enumerate(looking):
            plan = self._decide(prefetch, answers[4 * number : 4 * number + 4])
            if plan is not None:
                begun.append(plan)
        return begun

    def _decide(self, prefetch: Prefetch, answer: Sequence[int]) -> Prefetch | None:
        low, high, mark, opposite = answer[0], -answer[1], answer[2], -answer[3]
        if low == 0 and not prefetch.cancelled:
            return None  # some rank does not know yet
        if low != high and not prefetch.cancelled:
            self._bound[prefetch.op] = low - 1
            return None
        found = self._found.pop(prefetch.op, [])
        self._bound.pop(prefetch.op, None)
        stops: tuple[int, ...] = ()
        if not prefetch.cancelled and low > 1:
            stops = (low - 1,)
            if mark == opposite:
                stops = self._index.prefetches.stops_up_to(prefetch, found, low - 1)
        return self._index.prefetches.begin(prefetch.op, stops)

    def _persists(self) -> list[int]:
        return list(islice(self._index.persists.writing, PERSISTS))

    def _lookups(self) -> list[Prefetch]:
        return list(islice(self._index.prefetches.lookups.values(), LOOKUPS_A_STEP))

    def _prefetches(self) -> list[int]:
        return list(islice(self._index.prefetches.reading, PREFETCHES))

    def begun(self, plan: Persist | Prefetch) -> None:
        """Take note of a prefetch that this rank cannot read."""
        if isinstance(plan, Prefetch) and plan.failed_here:
            self._over.add(plan.op)


def _padded(values: list[int], length: int) -> list[int]:
    return values + [_NOT_YET] * (length - len(values))
