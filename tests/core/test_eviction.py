"""What one eviction frees beyond what was asked for, and what it must not."""

import numpy as np
import pytest

from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.device.victims import Spare, VictimQueue
from sglang_ext.core.table.columns import SlotColumn
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.interpreted import INTERPRETED
from tests.failures.scenarios import (
    check_all,
    engine_with,
    find,
    join,
    prompt,
    rows_of,
    serve_and_settle,
)

SPARE = Spare(3, 3)
BOTH = pytest.mark.parametrize("loops", [COMPILED, INTERPRETED], ids=["compiled", "interpreted"])


def test_without_a_host_tier_the_spare_goes_along() -> None:
    engine = engine_with(device_pages=20, device_window_pages=20, host_pages=0, spare=SPARE)
    serve_and_settle(engine, prompt(4, 1), prompt(4, 2), prompt(4, 3))
    assert engine.index.evict_device(0, 1) == (0, 4)
    assert engine.index.evict_device(1, 0)[0] == 4
    check_all(engine, idle=True)


def test_a_page_without_a_copy_is_never_spare() -> None:
    """It could still be copied; a policy that writes back has not done so yet."""
    engine = engine_with(
        device_pages=20, device_window_pages=20, write=WritePolicy.WRITE_BACK, spare=SPARE
    )
    serve_and_settle(engine, prompt(12))
    assert engine.index.table.host.n_present == 0
    assert engine.index.evict_device(1, 0) == (1, 1)
    left = engine.index.table.swa_device.n_present
    assert left > 1
    assert engine.index.evict_device(0, 1) == (0, 1)
    check_all(engine, idle=True)


def test_spare_pages_with_copies_are_still_found() -> None:
    engine = engine_with(device_pages=20, device_window_pages=20, spare=SPARE)
    serve_and_settle(engine, prompt(12))
    known = engine.index.table.n_rows
    assert engine.index.evict_device(1, 0)[0] == 4
    assert engine.index.table.n_rows == known
    check_all(engine, idle=True)


@BOTH
def test_what_was_shown_stays_in_the_queue_until_it_is_evicted(loops: Loops) -> None:
    column = SlotColumn(8, 1, loops)
    rows = np.arange(6)
    column.put(rows, np.arange(6, dtype=np.int32).reshape(6, 1), ready=True)
    queue = VictimQueue(column, np.arange(10, 18, dtype=np.int64))
    assert queue.first(4).tolist() == [0, 1, 2, 3]
    column.take(np.array([0, 1]))
    assert queue.first(3).tolist() == [2, 3, 4]
    column.lock(np.array([2]))
    assert queue.first(9).tolist() == [3, 4, 5]
    column.unlock(np.array([2]))
    assert queue.first(1).tolist() == [2]


def test_a_page_that_is_matched_and_not_admitted_keeps_its_rank() -> None:
    """One that was used once goes before one that was used twice, whenever that was."""
    engine = engine_with(device_pages=20, device_window_pages=20, host_pages=0, eviction="slru")
    first, once, twice = prompt(4, 1), prompt(4, 2), prompt(4, 3)
    serve_and_settle(engine, first, once, twice, join(twice, prompt(1, 4)))
    index = engine.index
    index.evict_device(1, 0)  # now the queue knows all of them
    index.residency.use(find(engine, once).rows)
    assert index.evict_device(8, 0)[0] == 8
    assert len(rows_of(engine, once)) == 0
    assert len(rows_of(engine, twice)) == 4


def test_requests_that_find_nothing_leave_nothing_behind() -> None:
    """They lock and release an empty path, perhaps for days before anything is evicted."""
    column = SlotColumn(8, 1)
    nothing = np.empty(0, dtype=np.int64)
    for _ in range(3):
        column.lock(nothing)
        column.unlock(nothing)
    assert column.take_offers() == []


@BOTH
def test_a_queue_names_the_oldest_whatever_has_happened(loops: Loops) -> None:
    """So many rows that a pass takes a part of them, by a guess of where it ends."""
    size, steps = (20_000, 300) if loops is COMPILED else (4_000, 30)
    random = np.random.default_rng(0)
    column = SlotColumn(size, 1, loops)
    age = random.permutation(size).astype(np.int64)
    queue = VictimQueue(column, age)
    slots = np.arange(size, dtype=np.int32).reshape(size, 1)
    column.put(np.arange(size), slots, ready=True)
    locked = np.empty(0, dtype=np.int64)
    for step in range(steps):
        count = int(random.integers(1, 200))
        victims = np.flatnonzero(column.present & (column.locks == 0))
        oldest = victims[np.argsort(age[victims])][:count]
        assert (queue.first(count) == oldest).all()
        changed = random.choice(size, 40, replace=False)
        present = changed[column.present[changed]]
        age[present] = size + 1000 * step + np.arange(len(present))
        column.take(oldest)
        gone = changed[~column.present[changed]]
        column.put(gone, slots[gone], ready=True)
        if step % 2:
            column.unlock(locked)
        else:
            column.lock(changed)
        locked = changed
    assert column.n_evictable < size
