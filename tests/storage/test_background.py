"""A page store behind threads."""

import threading

import pytest

from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Objects, Prefetch
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.background import BackgroundStorage
from sglang_ext.storage.port import FULL, WINDOW
from tests.core.storage_ranks import PAGE, rank, tokens
from tests.storage.pages import objects, persist, prefetch


class Store:
    """Answers no lookup before it is told to, and raises then."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def resume_points(self, keys: object, window: int) -> list[int]:
        self.go_on.wait()
        raise OSError("broken")

    def close(self) -> None:
        self.go_on.set()


def test_a_lookup_that_hangs_holds_up_no_flush_and_what_it_raises_is_a_miss() -> None:
    store, engine = Store(), rank()
    storage = BackgroundStorage(store, Geometry(PAGE, 2 * PAGE))  # type: ignore[arg-type]
    plan = engine.index.prefetches.look_up(tokens(4)[: 4 * PAGE].reshape(-1, PAGE), None)
    assert isinstance(plan, Prefetch)
    storage.submit_lookup(plan)
    assert storage.drain(timeout_s=120.0), "it waits for a lookup"
    store.go_on.set()
    ledger = StorageLedger(engine.index)
    while plan.op in engine.index.prefetches.lookups:
        storage.poll(ledger)
        ledger.commit(ledger.report(0))
    assert storage.errors == 1
    assert plan.cancelled
    storage.close()


class Calls:
    """Has everything, takes everything, and notes which objects each call was about."""

    def __init__(self) -> None:
        self.read: list[tuple[int, Objects]] = []
        self.written: list[tuple[int, Objects]] = []

    def load(self, component: int, batch: Objects) -> int:
        self.read.append((component, batch))
        return len(batch)

    def store(self, component: int, batch: Objects) -> int:
        self.written.append((component, batch))
        return len(batch)

    def use(self, keys: object, windows: object) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(("device_page", "pages"), [(1, 16), (2, 32), (3, 42), (4, 64), (64, 64)])
def test_a_call_has_no_more_objects_than_backends_queue(device_page: int, pages: int) -> None:
    """256 at most: Mooncake over TCP refuses what does not fit into a queue of 1,024 parts of
    objects, for reads and writes together."""
    geometry = Geometry(device_page, 128)
    whole, store = objects(geometry, 150, "page"), Calls()
    storage = BackgroundStorage(store, geometry)  # type: ignore[arg-type]
    storage.submit_persist(persist(whole, whole))
    storage.submit_prefetch(prefetch(geometry, whole, whole))
    assert storage.drain(timeout_s=120.0)
    storage.close()
    for calls in (store.read, store.written):
        assert [component for component, _ in calls] == sorted(component for component, _ in calls)
        for component in (FULL, WINDOW):
            batches = [batch for other, batch in calls if other == component]
            assert [len(batch) for batch in batches[:-1]] == [pages] * (len(batches) - 1)
            assert max(len(batch.keys) for batch in batches) <= 256
            assert [key for batch in batches for key in batch.keys] == whole.keys
            assert [slot for b in batches for slot in b.slots.tolist()] == whole.slots.tolist()
