"""Ages have so many bits for ticks, ranks and depth. Time, priorities and prompts have more."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.candidates import Candidates, Kind
from sglang_ext.core.compiled.constants import INSIDE_BAND, MAX_COUNT, MAX_TICK, UNUSED_BAND
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.eviction_policy import POLICIES
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.priority_ranks import PriorityRanks
from sglang_ext.core.table.table import AgeLimits, PageTable
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.sizes import PRIORITIES, Sizes

PAGE = 16
NOTHING = np.empty(0, dtype=np.int64)
BOTH = pytest.mark.parametrize("loops", [COMPILED, INTERPRETED], ids=["compiled", "interpreted"])
ANY = st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from(sorted(itertools.chain(*PRIORITIES)))
)


def table_with(loops: Loops, limits: AgeLimits, rows: int = 24, policy: str = "lru") -> PageTable:
    return PageTable(Geometry(PAGE, PAGE), rows, POLICIES[policy], limits, loops)


def add(table: PageTable, number: int, pages: int = 1) -> Rows:
    """A prefix that has been used by nobody."""
    return table.add_rows(NOTHING, np.full((pages, PAGE), number), None)


# ---- ticks --------------------------------------------------------------------------


@BOTH
@given(used=st.lists(st.integers(0, 5), min_size=1, max_size=400))
def test_pages_keep_their_order_however_long_it_goes_on(loops: Loops, used: list[int]) -> None:
    """Six prefixes of three pages in a table whose ages have bits for 60 ticks."""
    table = table_with(loops, AgeLimits(ticks=60))
    paths = [add(table, number, 3) for number in range(6)]
    last: dict[int, int] = {}
    for tick, number in enumerate(used):
        table.advance()
        table.record(paths[number][: 1 + tick % 3], tick, 0, 0)
        for page in range(1 + tick % 3):
            last[int(paths[number][page])] = tick
        rows = np.array(sorted(last, key=lambda row: (last[row], -table.depth[row])))
        assert (np.diff(table.age[rows]) > 0).all()
        assert table.now < 60 and table.tick == tick + 1
    ticks = np.array([last[row] + 1 for row in rows.tolist()])
    recent = ticks > table.tick - (60 - 24) // 2
    assert (table.last_use(rows)[recent] == ticks[recent]).all()
    assert (table.last_use(rows) >= ticks).all()


@BOTH
def test_windows_stay_in_their_bands(loops: Loops) -> None:
    """One that nobody resumes from, one inside a prompt, one at an end: in this order."""
    table = table_with(loops, AgeLimits(ticks=60))
    end, inside, unused = (int(add(table, number)[0]) for number in range(3))
    table.swa_age[inside] += INSIDE_BAND - UNUSED_BAND
    for _ in range(200):
        table.advance()
        table.use(np.array([end]))
        assert table.swa_age[unused] < table.swa_age[inside] < 0 < table.swa_age[end]
    assert table.window_idle(np.array([end])) == 0


@BOTH
def test_victims_are_in_order_of_the_ages_that_pages_have_now(loops: Loops) -> None:
    table = table_with(loops, AgeLimits(ticks=60))
    candidates = Candidates(table, KeptWindows(table, 1), has_host=True)
    for number in range(8):
        row = add(table, number)
        table.device.put(row, np.array([[number]], dtype=np.int32), ready=True)
        table.advance()
        table.use(row)
        candidates.note(row)
    assert candidates.first(Kind.VICTIMS, 1).tolist() == [0]
    for _ in range(60):
        table.advance()
        table.use(np.array([0]))  # and the ages that were known have gone by
        candidates.note(np.array([0]))
    assert candidates.first(Kind.VICTIMS, 8).tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_a_table_that_ages_cannot_order_is_refused() -> None:
    with pytest.raises(AssertionError, match="ages cannot order 24 rows"):
        table_with(COMPILED, AgeLimits(ticks=48))


def test_numbering_anew_is_rare() -> None:
    """With what a server has: at 1,000 ticks a second, once in a day and a half."""
    table = table_with(COMPILED, AgeLimits())
    calls: list[int] = []
    table.when_renumbered.append(lambda: calls.append(table.tick))
    row = add(table, 1)
    table.tick = MAX_TICK - 2
    for _ in range(4):
        table.advance()
        table.use(row)
    assert calls == [MAX_TICK]
    assert MAX_TICK - table.now > 1000 * 36 * 3600


# ---- depth --------------------------------------------------------------------------


@BOTH
def test_a_prefix_ends_where_ages_have_no_more_bits(loops: Loops) -> None:
    table = table_with(loops, AgeLimits(pages=5))
    rows = add(table, 1, 8)
    assert len(rows) == 5
    more = np.full((3, PAGE), 1)
    assert len(table.add_rows(rows, more, None)) == 0
    assert len(table.add_rows(rows[:3], more + 1, None)) == 2


def test_the_rest_of_a_prompt_stays_with_its_request() -> None:
    engine = SimEngine(Geometry(PAGE, PAGE), Sizes(24, 24, 16, 16))
    object.__setattr__(engine.index, "_limits", AgeLimits(pages=5))
    engine.index.reset()
    tokens = np.arange(8 * PAGE)
    for _ in range(2):
        request = engine.start(tokens)
        engine.compute(request, 3 * PAGE)
        engine.compute(request, len(tokens))
        assert request.protected == 5
        engine.finish(request)
        engine.settle()
        engine.check_every_slot()
    engine.check_idle()


# ---- counts -------------------------------------------------------------------------


@BOTH
def test_requests_and_forks_are_counted_as_far_as_there_are_bits(
    loops: Loops,
) -> None:
    table = table_with(loops, AgeLimits(), policy="lfu")
    row = add(table, 1)
    table.hits[row] = table.forks[row] = MAX_COUNT - 1
    for request in range(3):
        table.advance()
        table.record(row, request, 0, 0)
        table.add_rows(row, np.full((1, PAGE), request), None)
    assert table.hits[row] == table.forks[row] == MAX_COUNT
    assert table.age[row] > 0


# ---- priorities ---------------------------------------------------------------------


class Asked:
    """Priorities that were asked for, with their ranks."""

    def __init__(self, most: int) -> None:
        self.ranks, self.of = PriorityRanks(most), dict[int, int]()

    def ask(self, priority: int) -> None:
        rank = self.ranks.of(priority)
        if rank is None and self.ranks.is_time_to_spread():
            in_use = np.unique(np.array(list(self.of.values()), dtype=np.int32))
            renamed = self.ranks.spread(in_use)
            self.of = {known: int(renamed[rank]) for known, rank in self.of.items()}
            assert all(self.ranks.of(known) == rank for known, rank in self.of.items())
            rank = self.ranks.of(priority)
        self.of[priority] = self.ranks.share(priority) if rank is None else rank

    def in_order(self) -> list[int]:
        return [self.of[priority] for priority in sorted(self.of)]


@given(st.lists(ANY, min_size=1, max_size=250))
def test_different_priorities_have_different_ranks(priorities: list[int]) -> None:
    """As long as not all too many are in use."""
    asked = Asked(2047)
    for priority in priorities:
        asked.ask(priority)
    order = asked.in_order()
    assert (np.diff(order) > 0).all() and order[0] >= 1 and order[-1] <= 2047


@given(st.lists(ANY, min_size=1, max_size=60))
def test_with_more_priorities_than_ranks_none_is_inverted(priorities: list[int]) -> None:
    asked = Asked(7)
    for priority in priorities:
        asked.ask(priority)
        order = asked.in_order()
        assert (np.diff(order) >= 0).all() and order[0] >= 1 and order[-1] <= 7


@pytest.mark.parametrize("step", [1, -1], ids=["rising", "falling"])
def test_a_priority_for_every_request_is_rarely_numbered_anew(step: int) -> None:
    """Deadlines, or times of arrival."""
    table = table_with(COMPILED, AgeLimits(), policy="priority")
    calls: list[int] = []
    table.when_renumbered.append(lambda: calls.append(table.tick))
    rows = [add(table, number) for number in range(20)]
    for request in range(20_000):
        table.advance()
        table.record(rows[request % 20], request, 1_700_000_000 + step * request, 0)
    assert len(calls) < 20_000 // 40


@BOTH
def test_pages_keep_their_order_when_ranks_are_numbered_anew(
    loops: Loops,
) -> None:
    """Priorities that meet in the middle: each leaves half of the gap."""
    table = table_with(loops, AgeLimits(ranks=31), policy="priority")
    asked = [0, 1 << 62, *(1 << n for n in range(12, 0, -1))]
    rows = [int(add(table, number)[0]) for number in range(len(asked))]
    for number, priority in enumerate(asked):
        table.advance()
        table.record(np.array([rows[number]]), number, priority, 0)
        known = sorted(range(number + 1), key=asked.__getitem__)
        ages = table.age[[rows[n] for n in known]]
        assert (np.diff(ages) > 0).all()
