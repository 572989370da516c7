"""A page store behind threads: one for each kind of operation.

Lookups must not wait for reads, nor those for writes. What a page store raises ends here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Objects, Persist, Prefetch, Stage
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.port import FULL, WINDOW, PageStore

logger = logging.getLogger(__name__)

_BATCH = 64
"""Pages between two looks at whether anybody still waits for them."""

_MOST_OBJECTS = 256
"""In one call of the page store. Mooncake over TCP queues 1,024 parts for each of its peers and
lets as many wait for a second; what is beyond them fails. Each object is K and V, and one call
reads while another writes."""

_MOST_SECONDS_TO_CLOSE = 5.0
"""A storage that hangs must not keep the server from ending."""

T = TypeVar("T")
Report = Callable[[StorageLedger], None]


class _Lane:
    """A worker thread: first in, first out."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Condition()
        self._open = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], None]) -> None:
        with self._lock:
            self._open += 1
        self._inbox.put(run)

    def drain(self, deadline: float) -> bool:
        with self._lock:
            left = deadline - time.monotonic()
            return self._lock.wait_for(lambda: self._open == 0, max(0.0, left))

    def close(self) -> None:
        self._closed = True
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (run := self._inbox.get()) is not None:
            if not self._closed:
                run()
            with self._lock:
                self._open -= 1
                self._lock.notify_all()


class BackgroundStorage:
    """Storage (see ``storage.port``) over a page store.

    Attributes:
        errors: exceptions that the page store has raised.
        writes: False: persists end as soon as possible, whatever they have written.
    """

    def __init__(self, store: PageStore, geometry: Geometry) -> None:
        self.errors = 0
        self.writes = True
        self._store = store
        self._per_page = geometry.slots_per_page
        self._batch = min(_BATCH, _MOST_OBJECTS // self._per_page)
        self._window_pages = geometry.window_pages
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._lookups, self._reads, self._writes = (
            _Lane(f"kv-storage-{name}") for name in ("lookup", "read", "write")
        )

    # ---- submit --------------------------------------------------------------

    def submit_lookup(self, prefetch: Prefetch) -> None:
        """See Storage."""
        self._lookups.submit(lambda: self._look_up(prefetch))

    def submit_prefetch(self, prefetch: Prefetch) -> None:
        """See Storage."""
        if not prefetch.failed_here:
            self._reads.submit(lambda: self._read(prefetch))

    def submit_persist(self, persist: Persist) -> None:
        """See Storage."""
        self._writes.submit(lambda: self._write(persist))

    # ---- in the threads ------------------------------------------------------

    def _look_up(self, prefetch: Prefetch) -> None:
        stops: list[int] = []
        if not prefetch.cancelled:
            window = self._window_pages * self._per_page
            nothing: list[int] = []
            found = self._guard(lambda: self._store.resume_points(prefetch.keys, window), nothing)
            if prefetch.first:
                # a window that begins before the first key is not whole
                found = [stop for stop in found if stop >= window]
            first, per_page = prefetch.first, self._per_page
            stops = [first + stop // per_page for stop in found if stop % per_page == 0]
        self._reports.put(lambda ledger: ledger.found(prefetch.op, stops))

    def _read(self, prefetch: Prefetch) -> None:
        stop = 0
        for number, stage in enumerate(prefetch.stages):
            if not self._read_stage(prefetch, stage):
                break
            stop = prefetch.stops[number]
            self._reports.put(partial(_tell_read, prefetch.op, number + 1))
        self._reports.put(lambda ledger: ledger.over(prefetch.op))
        if stop:
            keys = prefetch.keys_up_to(stop, self._per_page)
            begin = max(0, stop - self._window_pages) * self._per_page
            self._guard(lambda: self._store.use(keys, range(begin, len(keys))), None)

    def _read_stage(self, prefetch: Prefetch, stage: Stage) -> bool:
        for component, objects in ((FULL, stage.full), (WINDOW, stage.window)):
            for batch in self._batches(objects):
                if prefetch.cancelled:
                    return False
                read = self._guard(partial(self._store.load, component, batch), 0)
                if read < len(batch):
                    return False
        return True

    def _write(self, persist: Persist) -> None:
        stored = 0
        if self.writes and self._has_what_is_before(persist):
            # first: what is in front of a page must not give way to it
            self._guard(lambda: self._store.use(persist.keys, persist.windows), None)
            stored = self._write_all(persist)
        self._reports.put(lambda ledger: ledger.persisted(persist.op, stored))

    def _has_what_is_before(self, persist: Persist) -> bool:
        before = persist.before
        return before is None or self._guard(lambda: self._store.has(before), False)

    def _write_all(self, persist: Persist) -> int:
        stored = 0
        for component, objects in ((FULL, persist.full), (WINDOW, persist.window)):
            for batch in self._batches(objects):
                if not self.writes:
                    return stored
                written = self._guard(partial(self._store.store, component, batch), 0)
                stored += written
                if written < len(batch):
                    return stored
        return stored

    def _batches(self, objects: Objects) -> Iterator[Objects]:
        for start in range(0, len(objects), self._batch):
            stop = min(start + self._batch, len(objects))
            keys = objects.keys[start * self._per_page : stop * self._per_page]
            yield Objects(keys, objects.slots[start:stop])

    def _guard(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except Exception as error:
            self.errors += 1
            if self.errors & (self.errors - 1) == 0:  # one line each time it has doubled
                logger.warning("storage: %d errors so far, the last: %r", self.errors, error)
            return otherwise

    # ---- report --------------------------------------------------------------

    def poll(self, ledger: StorageLedger) -> None:
        """See Storage."""
        while True:
            try:
                report = self._reports.get_nowait()
            except queue.Empty:
                return
            report(ledger)

    def drain(self, timeout_s: float) -> bool:
        """See Storage."""
        deadline = time.monotonic() + timeout_s
        return all(lane.drain(deadline) for lane in (self._reads, self._writes))

    def clear(self) -> bool:
        """Forget everything that is stored; False if the page store cannot."""
        before = self.errors
        self._guard(self._store.clear, None)
        return self.errors == before

    def close(self) -> None:
        """See Storage."""
        lanes = (self._lookups, self._reads, self._writes)
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.join(_MOST_SECONDS_TO_CLOSE)
        self._guard(self._store.close, None)


def _tell_read(op: int, stages: int, ledger: StorageLedger) -> None:
    ledger.read(op, stages)
