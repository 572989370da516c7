"""A simulated storage: real contents, virtual time, faults.

What a storage may do: be slow, hang, miss what it has just found, forget, fail to write, and
fill a slot with rubbish while it reports that the page could not be read. What it may not do is
to report a page as read that is another one's: checksums are for that.
"""

import dataclasses
import random
from collections import deque

import numpy as np

from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Objects, Persist, Prefetch, Stage
from sglang_ext.core.table.window import complete_windows
from sglang_ext.testing.pools import LAYERS, STALE
from sglang_ext.testing.transfers import HostSlots

RUBBISH = -7
"""Content of a slot after a read that failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class StorageFaults:
    """How long storage takes, in steps of the scheduler, and how often it goes wrong.

    Attributes:
        mean: time of an operation, or of a stage of one.
        hangs: chance that one takes 100 steps more.
        unreadable: chance that a page that was found cannot be read.
        unwritable: chance that a page cannot be written: a full disk.
        forgets: chance, for each operation, that storage loses a page.
    """

    mean: float = 1.0
    hangs: float = 0.0
    unreadable: float = 0.0
    unwritable: float = 0.0
    forgets: float = 0.0


@dataclasses.dataclass(slots=True)
class _Step:
    """A lookup, a persist, or a stage of a prefetch."""

    plan: Persist | Prefetch
    due: float
    stage: int = -1
    is_last: bool = True


class SimStore:
    """What one rank has in storage. It survives the rank.

    Attributes:
        pages: tag of each page, by component and key.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple[int, bytes], int] = {}
        self._ever: dict[tuple[int, bytes], int] = {}

    def write(self, component: int, key: bytes, tag: int) -> None:
        """Keep a page; one key is one page for ever."""
        assert tag != STALE, "storage reads a slot that was given back"
        assert tag != RUBBISH, "storage reads a slot that was never written"
        known = self._ever.setdefault((component, key), tag)
        assert known == tag, "two pages have one key"
        self.pages[component, key] = tag

    def forget(self, rng: random.Random) -> None:
        """Lose a page."""
        if self.pages:
            del self.pages[rng.choice(list(self.pages))]


class SimStorage:
    """Storage operations of one rank: each kind first in, first out.

    Args:
        store: what is there already.
        window_pages: see ``Geometry``.
    """

    def __init__(
        self,
        store: SimStore,
        host: HostSlots,
        window: HostSlots,
        window_pages: int,
        faults: StorageFaults,
        rng: random.Random,
    ) -> None:
        self.store = store
        self.seen: set[str] = set()
        self._slots = (host, window)
        self._window_pages = window_pages
        self._faults = faults
        self._rng = rng
        self._lanes: dict[str, deque[_Step]] = {
            name: deque() for name in ("lookup", "prefetch", "persist")
        }
        self._busy_until = dict.fromkeys(self._lanes, 0.0)
        self._broken: set[int] = set()

    @property
    def forgets(self) -> bool:
        """Whether pages get lost."""
        return self._faults.forgets > 0

    # ---- submit --------------------------------------------------------------

    def submit_lookup(self, prefetch: Prefetch, now: float) -> None:
        """Look for the pages of a prompt."""
        self._lanes["lookup"].append(_Step(prefetch, self._due("lookup", now)))

    def submit_prefetch(self, prefetch: Prefetch, now: float) -> None:
        """Read it, stage by stage."""
        if prefetch.failed_here:
            return
        last = len(prefetch.stages) - 1
        for number in range(len(prefetch.stages)):
            step = _Step(prefetch, self._due("prefetch", now), number, number == last)
            self._lanes["prefetch"].append(step)

    def submit_persist(self, persist: Persist, now: float) -> None:
        """Write pages."""
        self._lanes["persist"].append(_Step(persist, self._due("persist", now)))

    def _due(self, lane: str, now: float) -> float:
        faults, rng = self._faults, self._rng
        cost = rng.expovariate(1.0 / faults.mean)
        if rng.random() < faults.hangs:
            self.seen.add("storage hangs")
            cost += 100.0
        self._busy_until[lane] = max(now, self._busy_until[lane]) + cost
        return self._busy_until[lane]

    # ---- execute -------------------------------------------------------------

    def run_until(self, now: float, ledger: StorageLedger) -> None:
        """Execute what is due, and tell the ledger."""
        for lane in self._lanes.values():
            while lane and lane[0].due <= now:
                self._execute(lane.popleft(), ledger)

    def drain(self, ledger: StorageLedger) -> None:
        """Execute everything."""
        self.run_until(float("inf"), ledger)

    def in_flight(self, component: int) -> list[np.ndarray]:
        """Host slots of a component that storage reads or writes."""
        slots = []
        for step in (*self._lanes["prefetch"], *self._lanes["persist"]):
            if isinstance(step.plan, Persist):
                slots.append((step.plan.full, step.plan.window)[component].slots)
            else:
                stage = step.plan.stages[step.stage]
                slots.append((stage.full, stage.window)[component].slots)
        return slots

    def _execute(self, step: _Step, ledger: StorageLedger) -> None:
        plan = step.plan
        if self._rng.random() < self._faults.forgets:
            self.store.forget(self._rng)
            self.seen.add("storage forgets")
        if isinstance(plan, Persist):
            ledger.persisted(plan.op, self._persist(plan))
        elif step.stage < 0:
            ledger.found(plan.op, self._lookup(plan))
        else:
            self._prefetch(plan, step, ledger)

    def _lookup(self, prefetch: Prefetch) -> list[int]:
        per_page = len(prefetch.keys) // max(1, prefetch.limit - prefetch.first)
        keys = prefetch.keys
        pages = range(0, len(keys), per_page or 1)
        full = [self._has(0, keys[i : i + per_page]) for i in pages]
        reach = full.index(False) if False in full else len(full)
        has = [self._has(1, keys[i : i + per_page]) for i in pages][:reach]
        complete = complete_windows(np.array(has, dtype=bool), self._window_pages)
        stops: list[int] = (np.flatnonzero(complete) + prefetch.first + 1).tolist()
        if prefetch.first:
            stops = [s for s in stops if s - prefetch.first >= self._window_pages]
        return stops

    def _has(self, component: int, keys: list[bytes]) -> bool:
        return all((component, key) in self.store.pages for key in keys)

    def _prefetch(self, prefetch: Prefetch, step: _Step, ledger: StorageLedger) -> None:
        if prefetch.cancelled and prefetch.op not in self._broken:
            self.seen.add("prefetch cancelled while it reads")
            self._read(prefetch.stages[step.stage])  # what was under way comes to its end
            self._broken.add(prefetch.op)
        if prefetch.op not in self._broken:
            if self._read(prefetch.stages[step.stage]):
                ledger.read(prefetch.op, step.stage + 1)
            else:
                self.seen.add("a page that was found cannot be read")
                self._broken.add(prefetch.op)
        if step.is_last:
            ledger.over(prefetch.op)

    def _read(self, stage: Stage) -> bool:
        ok = True
        for component, objects in enumerate((stage.full, stage.window)):
            for key, slot in _each(objects):
                tag = self.store.pages.get((component, key))
                if tag is None or self._rng.random() < self._faults.unreadable:
                    tag, ok = RUBBISH, False
                for layer in range(LAYERS):
                    self._slots[component].put(layer, np.array([slot]), np.array([tag]))
        return ok

    def _persist(self, persist: Persist) -> int:
        """Pages stored from the first one on."""
        if persist.before and (0, persist.before) not in self.store.pages:
            self.seen.add("persist after a page that is gone")
            return 0
        stored = 0
        for component, objects in enumerate((persist.full, persist.window)):
            per_page: int = objects.slots.shape[1]
            for good, (key, slot) in enumerate(_each(objects)):
                if self._rng.random() < self._faults.unwritable:
                    self.seen.add("storage is full")
                    return stored + good // per_page
                tags = [self._slots[component].get(n, np.array([slot])) for n in range(LAYERS)]
                assert len(np.unique(tags)) == 1, "a page is persisted before it is copied"
                self.store.write(component, key, int(tags[0][0]))
            stored += len(objects)
        return stored


def _each(objects: Objects) -> list[tuple[bytes, int]]:
    return list(zip(objects.keys, objects.slots.reshape(-1).tolist(), strict=True))
