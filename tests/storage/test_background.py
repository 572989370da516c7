"""A page store behind threads."""

import threading

from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Prefetch
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.background import BackgroundStorage
from tests.core.storage_ranks import PAGE, rank, tokens


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
