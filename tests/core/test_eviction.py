"""What one eviction frees beyond what was asked for, and what it must not."""

import numpy as np

from sglang_ext.core.columns import SlotColumn
from sglang_ext.core.compiled.columns import CompiledColumn
from sglang_ext.core.compiled.victims import CompiledVictims
from sglang_ext.core.eviction import Spare, VictimQueue
from sglang_ext.core.write_policy import WritePolicy
from tests.failures.scenarios import check_all, engine_with, prompt, serve_and_settle

SPARE = Spare(3, 3)


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
    assert engine.index.evict_device(0, 1)[1] <= 4
    check_all(engine, idle=True)


def test_spare_pages_with_copies_are_still_found() -> None:
    engine = engine_with(device_pages=20, device_window_pages=20, spare=SPARE)
    serve_and_settle(engine, prompt(12))
    known = engine.index.table.n_rows
    assert engine.index.evict_device(1, 0)[0] == 4
    assert engine.index.table.n_rows == known
    check_all(engine, idle=True)


def test_what_was_shown_stays_in_the_queue_until_it_is_evicted() -> None:
    for column_type, queue_type in ((SlotColumn, VictimQueue), (CompiledColumn, CompiledVictims)):
        column = column_type(8, 1)
        rows = np.arange(6)
        column.put(rows, np.arange(6, dtype=np.int32).reshape(6, 1), ready=True)
        queue = queue_type(column, np.arange(10, 18, dtype=np.int64))
        assert queue.first(4).tolist() == [0, 1, 2, 3]
        column.take(np.array([0, 1]))
        assert queue.first(3).tolist() == [2, 3, 4]
        column.lock(np.array([2]))
        assert queue.first(9).tolist() == [3, 4, 5]
        column.unlock(np.array([2]))
        assert queue.first(1).tolist() == [2]
