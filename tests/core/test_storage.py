"""Persists and prefetches, step by step, on simulated ranks."""

import numpy as np
import pytest

from sglang_ext.core import invariants
from sglang_ext.core.counters import Unfulfilled
from sglang_ext.core.plan import Declined, DeclineReason, TransferKind
from sglang_ext.core.storage.attachment import FIRST_PAUSE_MS
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Prefetch
from sglang_ext.core.table.table import STORED, STORING
from sglang_ext.core.table.window import complete_windows
from sglang_ext.testing.storage import SimStore, StorageFaults
from tests.core.storage_ranks import FAST, PAGE, match, rank, serve, step, tokens
from tests.core.test_dense_windows import WholeChunks
from tests.failures.scenarios import rows_of


def test_a_new_rank_finds_in_storage_what_another_one_has_served() -> None:
    store = SimStore()
    serve(rank(store), tokens(10))
    fresh = rank(store)
    serve(fresh, tokens(12))
    counters = fresh.index.counters
    assert counters.prefetched_pages == 10
    assert counters.prefetched_window_pages == 2, "more than the window"
    assert counters.loaded_pages == 10
    assert counters.found_pages == 10
    assert not counters.unfulfilled.total()
    fresh.check_idle()


def test_a_part_of_a_prefetch_is_of_use() -> None:
    """Stages are published one by one; who does not wait for the last one keeps the others."""
    store = SimStore()
    serve(rank(store, checkpoint_pages=4), tokens(12))
    fresh = rank(store, checkpoint_pages=4, storage_stop=4)
    plan = fresh.index.prefetches.look_up(tokens(12)[: 12 * PAGE].reshape(-1, PAGE), None)
    assert isinstance(plan, Prefetch)
    fresh.storage_ledger.found(plan.op, [4, 8, 12])
    fresh.commit_storage(fresh.storage_report())
    assert plan.stops == (4, 8, 12)
    assert [len(stage.full) for stage in plan.stages] == [4, 4, 4]
    assert [len(stage.window) for stage in plan.stages] == [2, 2, 2]
    assert fresh.storage is not None
    assert fresh.storage._read(plan.stages[0])
    fresh.storage_ledger.read(plan.op, 1)
    fresh.commit_storage(fresh.storage_report())
    assert match(fresh, tokens(12)) == 4
    fresh.index.prefetches.cancel(plan.op)
    fresh.check()
    step(fresh)
    fresh.check_idle()
    assert match(fresh, tokens(12)) == 4
    assert fresh.index.counters.lost_prefetched_pages == 8
    assert fresh.index.counters.lost_prefetched_window_pages == 4
    assert fresh.index.counters.found_pages == 12
    assert fresh.index.counters.unfulfilled == {Unfulfilled.LATE: 8}


def test_a_prompt_that_has_lost_its_end_in_storage_is_of_use_up_to_a_window_inside() -> None:
    """Windows that the host keeps only while it has room are written too, further apart: without
    one a prompt is lost with its last page."""
    sizes = {"checkpoint_pages": 0, "dense_pages": 4, "host_pages": 80, "host_window_pages": 80}
    for dense, stored in ((0, [24]), (4, [4, 8, 12, 16, 20, 24]), (9, [8, 16, 24])):
        engine = rank(SimStore(), WholeChunks, **sizes, storage_dense=dense)
        serve(engine, tokens(24), chunk=24 * PAGE)
        table, path = engine.index.table, rows_of(engine, tokens(24))
        there = np.flatnonzero(complete_windows(table.window_stored[path] == STORED, 2)) + 1
        assert there.tolist() == stored, dense


@pytest.mark.parametrize("eviction", ["lru", "learned"])
def test_what_has_been_read_for_a_request_does_not_leave_before_it(eviction: str) -> None:
    """No request has ended with these pages, so nothing has been learned of them; the host would
    read them in vain if others came first."""
    store = SimStore()
    serve(rank(store), tokens(10))
    fresh = rank(store, eviction=eviction, device_pages=16, device_window_pages=16)
    for seed in (1, 2, 3, 4):
        serve(fresh, tokens(7, seed))
    fresh.arrive(tokens(10))
    for _ in range(6):
        step(fresh)
    read = rows_of(fresh, tokens(10))
    assert match(fresh, tokens(10)) == len(read) == 10
    left: list[int] = []
    while (end := next(fresh.index.room.tails(float("inf"), [], []), None)) is not None:
        left.append(end)
        fresh.index.room.drop_tail(end)
    assert len(left) > 1
    assert left.index(read[-1]) == len(left) - 1, "others have left later"


def test_what_storage_has_and_a_request_does_not_get_is_counted_by_reason() -> None:
    store = SimStore()
    serve(rank(store), tokens(10))
    unread = rank(store)
    assert unread.storage is not None
    unread.storage._faults = StorageFaults(mean=1e-6, unreadable=1.0)
    serve(unread, tokens(12))
    assert unread.index.counters.found_pages == 10
    assert unread.index.counters.unfulfilled == {Unfulfilled.UNREAD: 10}
    full = rank(store, host_pages=8)
    full.index.prefetches.look_up(tokens(12)[: 12 * PAGE].reshape(-1, PAGE), None)
    full.storage_ledger.found(0, [10])
    full.index.prefetches.lookups[0].limit = 12
    full.commit_storage(full.storage_report())
    assert full.index.counters.unfulfilled == {Unfulfilled.HOST_FULL: 10}


def test_ranks_agree_on_a_resume_point_that_all_of_them_have() -> None:
    """Each one's deepest is not enough: they name smaller ones until all name the same."""
    ranks = [rank(), rank(), rank()]
    found = [[4, 6, 12], [4, 6, 8], [4, 12]]
    for engine, stops in zip(ranks, found, strict=True):
        plan = engine.index.prefetches.look_up(tokens(12)[: 12 * PAGE].reshape(-1, PAGE), None)
        assert isinstance(plan, Prefetch)
        engine.storage_ledger.found(plan.op, stops)
    for _ in range(4):
        agreed = [min(v) for v in zip(*(e.storage_report() for e in ranks), strict=True)]
        begun = [engine.storage_ledger.commit(agreed) for engine in ranks]
        if begun[0]:
            break
    assert [plan.stops for (plan,) in begun] == [(4,)] * 3


def test_a_lookup_that_is_late_on_one_rank_is_not_decided() -> None:
    ranks = [rank(), rank()]
    for engine in ranks:
        engine.index.prefetches.look_up(tokens(4)[: 4 * PAGE].reshape(-1, PAGE), None)
    ranks[0].storage_ledger.found(0, [4])
    agreed = [min(v) for v in zip(*(e.storage_report() for e in ranks), strict=True)]
    assert [engine.storage_ledger.commit(agreed) for engine in ranks] == [[], []]
    assert all(0 in engine.index.prefetches.lookups for engine in ranks)


def test_what_fails_to_be_written_is_written_later() -> None:
    """A full disk: pages do not count as stored; after a pause they are tried again."""
    engine = rank()
    assert engine.storage is not None
    engine.storage._faults = StorageFaults(mean=1e-6, unwritable=1.0)
    serve(engine, tokens(6))
    table = engine.index.table
    assert not table.stored.any()
    assert engine.index.counters.unpersisted_pages > 0
    engine.storage._faults = FAST
    engine.now += 20_000.0  # milliseconds: longer than any pause
    for _ in range(4):
        step(engine)
    path = table.lookup(tokens(6)[: 6 * PAGE].reshape(-1, PAGE), None)
    assert (table.stored[path] == STORED).all()


def test_writes_that_fail_together_are_one_failure() -> None:
    """However many were on their way when storage stumbled: it is tried again after one pause."""
    engine = rank(host_pages=200)
    index = engine.index
    for seed in range(12):
        request = engine.start(tokens(4, seed))
        engine.compute(request, 100 * PAGE)
        engine.finish(request)
    engine.settle()
    plans = index.persists.begin(0)
    assert len(plans) > 3
    for plan in plans:
        index.persists.commit(plan.op, 0, 7)
    assert index.attachment.paused_until == 7 + FIRST_PAUSE_MS
    assert not index.persists.begin(6 + FIRST_PAUSE_MS)
    plan, *_ = index.persists.begin(7 + FIRST_PAUSE_MS)
    index.persists.commit(plan.op, 0, 200)
    assert index.attachment.paused_until == 200 + 2 * FIRST_PAUSE_MS


def test_a_storage_that_lost_everything_is_filled_again() -> None:
    """Noticed when a conversation goes on: what is in front of its new pages is not there."""
    store = SimStore()
    engine = rank(store)
    serve(engine, tokens(6))
    store.pages.clear()
    serve(engine, tokens(9))
    engine.now += 20_000.0
    for _ in range(6):
        step(engine)
    path = engine.index.table.lookup(tokens(9)[: 9 * PAGE].reshape(-1, PAGE), None)
    keys = engine.index.table.storage_keys(path)
    assert all((0, key) in store.pages for key in keys)


def test_forgetting_while_another_branch_is_written_leaves_no_hole() -> None:
    """Two persists in flight below one prefix; the first one finds the prefix gone."""
    engine = rank(host_pages=200)
    serve(engine, tokens(4))
    index = engine.index
    shared = tokens(4)[: 4 * PAGE]
    for seed in (1, 2):
        prompt = np.concatenate((shared, tokens(4, seed)))
        request = engine.start(prompt)
        engine.compute(request, 100 * PAGE)
        engine.finish(request)
    engine.settle()
    plans = index.persists.begin(0)
    assert len(plans) == 2
    index.persists.commit(plans[0].op, 0, 0)
    index.persists.commit(plans[1].op, len(plans[1].full) + len(plans[1].window), 0)
    invariants.check(index)
    assert not (index.table.stored == STORING).any()


def test_a_backlog_is_a_refusal() -> None:
    """Prefetches take half of the host at most."""
    engine = rank(host_pages=8, host_window_pages=8, extent_pages=0)
    for seed in range(3):
        prompt = tokens(12, seed)[: 12 * PAGE].reshape(-1, PAGE)
        plan = engine.index.prefetches.look_up(prompt, None)
        if isinstance(plan, Prefetch):
            engine.storage_ledger.found(plan.op, [4])
            engine.storage_ledger.commit(engine.storage_report())
    assert isinstance(plan, Declined)
    assert plan.reason is DeclineReason.STORAGE_BACKLOG


def test_the_clock_of_the_slowest_rank_counts() -> None:
    engine = rank()
    ledger = StorageLedger(engine.index)
    ledger.commit(ledger.report(50))
    assert ledger.now_ms == 50
    ledger.commit(ledger.report(20))
    assert ledger.now_ms == 50, "it never goes back"


def test_early_copies_recycle_what_storage_has_too() -> None:
    """A host that is full of copies must not keep new pages from storage."""
    store = SimStore()
    engine = rank(store, host_pages=12, host_window_pages=12)
    for seed in range(3):
        serve(engine, tokens(9, seed))
    for _ in range(30):  # one page at a time: an eighth of this host
        step(engine)
    for seed in range(3):
        pages = tokens(9, seed)[: 9 * PAGE].reshape(-1, PAGE)
        path = engine.index.table.lookup(pages, None)
        keys = engine.index.table.storage_keys(path)
        assert all((0, key) in store.pages for key in keys), f"prompt {seed} is not in storage"
    assert not engine.index.pending[TransferKind.BACKUP]
