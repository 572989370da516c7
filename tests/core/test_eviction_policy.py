"""Every policy evicts leaves before what they hang on."""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import INSIDE_BAND, MAX_RANK, MAX_TICK, TICK_SHIFT
from sglang_ext.core.eviction_policy import POLICIES
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.sizes import PRIORITIES, Sizes
from tests.failures.scenarios import PAGE, find, join, prompt, rows_of

RANKS = st.integers(0, MAX_RANK)
PATHS = st.lists(st.tuples(st.integers(0, 1 << 30), RANKS), min_size=1, max_size=30)
WILD = st.sampled_from(sorted(itertools.chain(*PRIORITIES)))


@given(PATHS, st.sampled_from(sorted(POLICIES)))
def test_ranks_never_rise_along_a_path(uses: list[tuple[int, int]], policy: str) -> None:
    """All requests of a page have used the pages before it."""
    hits, priorities = (np.sort(np.array(n, dtype=np.int32))[::-1] for n in zip(*uses, strict=True))
    depths = np.arange(len(hits))
    columns = SimpleNamespace(hits=hits, priority=priorities, depth=depths)
    number = int(POLICIES[policy])
    ranks = [INTERPRETED.paths.rank_of(columns, row, number) for row in range(len(hits))]
    assert (np.diff(ranks) <= 0).all()
    assert min(ranks) >= 0 and max(ranks) <= MAX_RANK


@given(st.lists(st.tuples(st.integers(1, 8), WILD), min_size=1, max_size=40))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_selection_by_age_is_leaf_first(policy: str, requests: list[tuple[int, int]]) -> None:
    """Requests for more or less of one prompt: at any time deeper pages go first."""
    table = PageTable(Geometry(PAGE, 16), 8, POLICIES[policy])
    rows = table.add_rows(np.empty(0, dtype=np.int64), np.arange(8 * PAGE).reshape(8, PAGE), None)
    table.use(rows)
    for number, (count, priority) in enumerate(requests):
        table.advance()
        table.count_request(rows[:count], number, priority)
        table.use(rows[:count])
        assert (np.diff(table.age[rows]) < 0).all()


def test_the_largest_age_leaves_room_for_the_bands_of_windows() -> None:
    table = PageTable(Geometry(PAGE, 16), 1, POLICIES["lfu"])
    row = table.add_rows(np.empty(0, dtype=np.int64), np.zeros((1, PAGE), dtype=np.int64), None)
    table.tick = MAX_TICK
    table.hits[row] = 1 << 30
    table.use(row)
    assert 0 < table.age[0] < -INSIDE_BAND
    assert table.age[0] >> TICK_SHIFT > table.tick


SERVED = {  # (prefixes in the order of their requests, their priorities, the one to go first)
    "lru": ((1, 1, 1, 2, 3), {}, 1),
    "lfu": ((1, 1, 2, 3, 3, 3), {}, 2),
    "slru": ((1, 1, 3, 2, 2), {}, 3),
    "priority": ((3, 1, 2), {3: 5, 1: 1, 2: 0}, 2),
    # of these the first two were one: all above 127, or below -128
    "priority: far from 0": ((1, 2, 3), {1: 2000, 2: 1000, 3: 2000}, 2),
    "priority: below 0": ((1, 2, 3), {1: -1000, 2: -2000, 3: -1000}, 2),
    # and these were inverted: they do not fit in 32 bits
    "priority: beyond 32 bits": ((1, 2, 3), {1: 3_000_000_000, 2: 0, 3: 1}, 2),
    "priority: the largest": ((1, 2, 3), {1: sys.maxsize, 2: 0, 3: sys.maxsize - 1}, 2),
    "priority: the smallest": ((1, 2, 3), {1: 0, 2: -sys.maxsize - 1, 3: -sys.maxsize}, 2),
}


@pytest.mark.parametrize("write", list(WritePolicy))
@pytest.mark.parametrize("case", SERVED)
def test_what_goes_first(case: str, write: WritePolicy) -> None:
    order, priorities, victim = SERVED[case]
    policy = case.partition(":")[0]
    engine = SimEngine(Geometry(PAGE, 32), Sizes(40, 40, eviction=policy, write=write))
    for number, seed in enumerate(order):
        tokens = join(prompt(4, seed), prompt(1, 100 + number))
        request = engine.start(tokens, priority=priorities.get(seed, 0))
        engine.compute(request, len(tokens))
        engine.finish(request)
    last = {seed: rows_of(engine, prompt(4, seed))[-1] for seed in (1, 2, 3)}
    assert min(last, key=lambda seed: engine.index.table.age[last[seed]]) == victim
    engine.check_idle()


@pytest.mark.parametrize("host", [0, 40])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_windows_leave_the_device_by_their_last_use_and_are_found_on_the_host(
    policy: str, host: int
) -> None:
    """Policies rank pages, and windows on the device have no rank of their own. Without a host the
    window of the most wanted prompt is lost, as with the engine's own cache."""
    room = Sizes(40, device_window_pages=10, host_pages=host, host_window_pages=host)
    engine = SimEngine(Geometry(PAGE, 32), dataclasses.replace(room, eviction=policy))
    for seed in (1, 1, 1, 2, 3, 4, 5):
        tokens = prompt(4, seed)
        request = engine.start(tokens, priority=9 if seed == 1 else 0)
        engine.compute(request, len(tokens))
        engine.finish(request)
        engine.settle()
    found = [find(engine, prompt(4, seed)) for seed in (1, 2, 3, 4, 5)]
    assert [match.device_pages for match in found] == [0, 0, 4, 4, 4]
    assert [len(match.rows) for match in found] == ([4] * 5 if host else [0, 0, 4, 4, 4])
    assert len(rows_of(engine, prompt(4, 1))) == 4, "full attention has room for all"
    engine.check_idle()


def test_what_a_prefix_can_spare_goes_first() -> None:
    """Two pages at the end of each, those of the older prefix before those of the younger; then
    the rest, in the same order. What a longer prefix goes on from is needed."""
    engine = SimEngine(Geometry(PAGE, 32), Sizes(40, 40, eviction="tlru", spare_pages=2))

    def compute(tokens: NDArray[np.int64]) -> None:
        request = engine.start(tokens)
        engine.compute(request, len(tokens))
        engine.finish(request)

    def order(*paths: Rows) -> list[int]:
        rows = np.concatenate(paths)
        return rows[np.argsort(engine.index.table.age[rows])].tolist()

    old, young = prompt(4, 1), prompt(4, 2)
    compute(old)
    compute(young)
    first, second = rows_of(engine, old), rows_of(engine, young)
    backwards = [*first[:1:-1], *second[:1:-1], *first[1::-1], *second[1::-1]]
    assert order(first, second) == backwards
    longer = join(old, prompt(2, 3))
    compute(longer)
    first = rows_of(engine, longer)
    assert order(first, second) == [*second[:1:-1], *first[:3:-1], *second[1::-1], *first[3::-1]]
    engine.check_idle()
