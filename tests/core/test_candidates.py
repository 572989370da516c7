"""What is kept in order, where it is too much for one block; small tables are in every machine."""

import numpy as np
import pytest

from sglang_ext.core.candidates import Candidates, Kind
from sglang_ext.core.compiled.ordered import BLOCK
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable

ROWS = 20 * BLOCK


@pytest.mark.parametrize("largest_age", [3, 1 << 40], ids=["few ages", "many ages"])
@pytest.mark.parametrize("has_host", [False, True], ids=["device", "host"])
def test_victims_are_in_order_whatever_has_happened(largest_age: int, has_host: bool) -> None:
    random = np.random.default_rng(largest_age)
    table = PageTable(Geometry(16, 16), ROWS)
    candidates = Candidates(table, KeptWindows(table, 1), has_host=has_host)
    slots = np.arange(ROWS, dtype=np.int32).reshape(ROWS, 1)
    column = table.device
    column.put(np.arange(ROWS), slots, ready=True)
    locked = np.empty(0, dtype=np.int64)
    for step in range(400):
        count = int(random.integers(1, 200))
        victims = np.flatnonzero(column.present & (column.locks == 0))
        in_order = victims[np.lexsort((victims, table.age[victims]))]
        assert candidates.size(Kind.VICTIMS) == len(victims)
        assert (candidates.first(Kind.VICTIMS, count) == in_order[:count]).all()
        assert (candidates.all(Kind.VICTIMS) == in_order).all()
        changed = random.choice(ROWS, 200, replace=False)
        table.age[changed] = random.integers(0, largest_age, len(changed)) + step // 100
        candidates.note(changed)
        # first more and more go, then they come again
        if step % 200 < 100:
            column.take(in_order[:count])
        else:
            gone = np.flatnonzero(~column.present)[:count]
            column.put(gone, slots[gone], ready=True)
        if len(locked):
            column.unlock(locked)
        locked = changed[: step % 150]
        column.lock(locked)


@pytest.mark.parametrize("has_host", [False, True], ids=["device", "host"])
def test_nothing_is_found_where_nothing_is(has_host: bool) -> None:
    table = PageTable(Geometry(16, 16), 8)
    candidates = Candidates(table, KeptWindows(table, 1), has_host=has_host)
    for kind in Kind:
        assert candidates.first(kind, 3).tolist() == []
    assert candidates.on_both_tiers() == 0
    candidates.note(np.empty(0, dtype=np.int64))
    assert candidates.youngest((Kind.DUPLICATES,), 3, 0).tolist() == []
