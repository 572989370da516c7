"""``Order`` against a model that looks at all rows."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang_ext.core.compiled.bins import BINS, EDGES, bin_of
from sglang_ext.core.compiled.returns import CLASSES
from sglang_ext.core.retention.estimate import Estimate
from sglang_ext.core.retention.order import Order
from tests.core import retention_model as model

# a tree of rows: row 0 has children 1 and 2, and so on
ROWS = 40
PARENT = [(row - 1) // 2 if row >= 2 else -1 for row in range(ROWS)]


def path_to(row: int) -> list[int]:
    path = []
    while row >= 0:
        path.append(row)
        row = PARENT[row]
    return path[::-1]


def rows_of(rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def estimate_of(values: np.ndarray) -> Estimate:
    cells = np.lexsort((-np.tile(np.arange(BINS), CLASSES), values.ravel())).astype(np.int32)
    ranks = np.empty_like(cells)
    ranks[cells] = np.arange(len(cells), dtype=np.int32)
    return Estimate(np.zeros_like(values), values, cells, ranks)


def test_bins_are_those_of_their_edges() -> None:
    assert [bin_of(age) for age in range(20_000)] == [model.bin_of(age) for age in range(20_000)]
    assert np.all(np.diff(EDGES) >= 1)


class OrderMachine(RuleBasedStateMachine):
    """Two lanes. The second has what left the first one, as a host without copies would."""

    def __init__(self) -> None:
        super().__init__()
        self.order = Order(rows_of(PARENT), longest=8, lanes=2)
        self.models = [model.OrderModel(PARENT), model.OrderModel(PARENT)]
        self.tick = 0

    @rule(
        row=st.integers(0, ROWS - 1),
        kinds=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        wait=st.integers(1, 40),
    )
    def request(self, row: int, kinds: list[int], wait: int) -> None:
        self.tick += wait
        path = path_to(row)
        kinds = sorted(kinds)[: len(path)]
        self.order.use(rows_of(path), np.array(kinds, dtype=np.int16), self.tick)
        for number, lane in enumerate(self.models):
            lane.touch(path, kinds, self.tick)
            if number:
                for page in path[::-1]:
                    if page in lane.here:
                        lane.here.discard(page)
                        self.order.lanes[1].remove(page)
        self.order.lanes[0].put(rows_of(path))
        self.models[0].here.update(path)

    @rule(row=st.integers(0, ROWS - 1), lane=st.integers(0, 1))
    def lock(self, row: int, lane: int) -> None:
        path = path_to(row)
        self.order.lanes[lane].hold(rows_of(path))
        for page in path:
            locks = self.models[lane].locks
            locks[page] = locks.get(page, 0) + 1

    @rule(row=st.integers(0, ROWS - 1), lane=st.integers(0, 1))
    def unlock(self, row: int, lane: int) -> None:
        path = path_to(row)
        locks = self.models[lane].locks
        if all(locks.get(page) for page in path):
            self.order.lanes[lane].release(rows_of(path))
            for page in path:
                locks[page] -= 1

    @rule(count=st.integers(1, 6))
    def oldest(self, count: int) -> None:
        expected = []
        while len(expected) < count and (row := self.models[0].oldest()) is not None:
            self.models[0].here.discard(row)
            expected.append(row)
        first = self.order.lanes[0].next_oldest()
        assert first == (expected[0] if expected else None)
        assert self.order.lanes[0].oldest(count).tolist() == expected
        self.move(expected)

    @rule(count=st.integers(1, 6), seed=st.integers(0, 50), lane=st.integers(0, 1))
    def cheapest(self, count: int, seed: int, lane: int) -> None:
        values = np.random.default_rng(seed).integers(0, 9, (CLASSES, BINS))
        estimate = estimate_of(values)
        expected = []
        ranks = estimate.ranks.tolist()
        rows = self.models[lane]
        while len(expected) < count and (row := rows.cheapest(ranks, self.tick)) is not None:
            rows.here.discard(row)
            expected.append(row)
        first = self.order.lanes[lane].next_cheapest(estimate, self.tick)
        assert first == (expected[0] if expected else None)
        assert self.order.lanes[lane].cheapest(count, estimate, self.tick).tolist() == expected
        if lane == 0:
            self.move(expected)

    def move(self, rows: list[int]) -> None:
        """What left the first lane comes to the second, as long as there is no gap below it."""
        for row in rows:
            below = {child for child in range(ROWS) if PARENT[child] == row}
            if below <= self.models[1].here or not below & set(self.models[0].use):
                self.order.lanes[1].put(rows_of([row]))
                self.models[1].here.add(row)

    @invariant()
    def same_rows(self) -> None:
        for lane, rows in zip(self.order.lanes, self.models, strict=True):
            assert {row for row in range(ROWS) if row in lane} == rows.here


OrderMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestOrder = OrderMachine.TestCase


def test_stamps_are_found_however_far_apart_they_are() -> None:
    """Across words of the bitmap, and of both of its summaries."""
    rows = 300_000
    order = Order(np.full(rows, -1, dtype=np.int32), longest=1)
    (lane,) = order.lanes
    kinds = np.zeros(1, dtype=np.int16)
    for row in range(rows):
        order.use(rows_of([row]), kinds, row + 1)
    far = [5, 70, 4200, 5000, 262_150, 299_999]
    lane.put(rows_of(far[::-1]))
    assert lane.oldest(10).tolist() == far
    lane.put(rows_of(far))
    # one cell: the last bin, but for the youngest one
    assert (
        lane.cheapest(10, estimate_of(np.zeros((CLASSES, BINS), dtype=np.int64)), rows).tolist()
        == far
    )


def test_numbers_of_uses_never_run_out() -> None:
    order = Order(rows_of(PARENT), longest=8)
    (lane,) = order.lanes
    rows = model.OrderModel(PARENT)
    random = np.random.default_rng(3)
    for tick in range(1, 2000):
        path = path_to(int(random.integers(ROWS)))
        order.use(rows_of(path), np.zeros(len(path), dtype=np.int16), tick)
        lane.put(rows_of(path))
        rows.touch(path, [0] * len(path), tick)
        rows.here.update(path)
        if tick % 3 == 0:
            expected = rows.oldest()
            rows.here.discard(expected)
            assert lane.oldest(1).tolist() == [expected]
