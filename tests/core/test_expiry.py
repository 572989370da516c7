"""When pages expire, who decides that, and what is copied to the host then."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.bins import BINS, EDGES
from sglang_ext.core.compiled.constants import INSIDE_BAND, TICK_SHIFT
from sglang_ext.core.compiled.least_worth import least_worth
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.compiled.returns import CLASSES, UNIT, answer_class, class_of
from sglang_ext.core.eviction_policy import EvictionPolicy
from sglang_ext.core.host.room import HostRoom
from sglang_ext.core.retention import expiry as expiry_module
from sglang_ext.core.retention.estimate import Estimate
from sglang_ext.core.retention.expiry import UNKNOWN, Expiry
from sglang_ext.core.retention.retention import Retention
from sglang_ext.core.retention.returns import Digests, Kinds
from sglang_ext.core.table import window as window_module
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import AgeLimits, PageTable
from sglang_ext.testing import definitions
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.simulation import Simulation
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import PAGE, find, prompt

SEEDS, FEW, STEPS = 40, 8, 400
FIRST = (7, 29, 146)
"""Copies stay there, and what goes before them does."""
CLASS = 3
BOTH = pytest.mark.parametrize("loops", [COMPILED, INTERPRETED], ids=["compiled", "interpreted"])
Patch = pytest.MonkeyPatch


class Told(Retention):
    """What is learned is given, and holds from the first request on.

    Args:
        chances: of all pages to be used again before they are older than a bin, in 2**-30.
        values: of all pages, by bin.
    """

    def __init__(self, chances: int, values: list[int], *, learned: bool = True) -> None:
        super().__init__([64], rebuild=1)
        self.told = learned
        all_chances = np.full((CLASSES, BINS), chances, dtype=np.int64)
        of = Estimate.of(all_chances, np.zeros(CLASSES, dtype=np.int64))
        rows = np.zeros((CLASSES, BINS), dtype=np.int64)
        rows[:, : len(values)] = values
        self.estimate = Estimate(of.chances, rows, of.cells, of.ranks)

    def learned(self, tier: int) -> bool:
        return self.told

    def request(self, digests: Digests, prompt: int | None = None, apart: int = 1) -> Kinds:
        self.tick += 1
        return np.full(len(digests), CLASS, dtype=np.int16)


def engine_that_is_told(retention: Retention, **sizes: Any) -> SimEngine:
    def index(*args: Any, **options: Any) -> PrefixCache:
        return PrefixCache(*args, **{**options, "retention": retention})

    made: Any = index
    return SimEngine(
        Geometry(PAGE, PAGE), Sizes(16, 16, eviction="learned", **sizes), index_type=made
    )


def serve(engine: SimEngine, seed: int, pages: int = 4) -> None:
    request = engine.start(prompt(pages, seed))
    engine.compute(request, pages * PAGE)
    engine.finish(request)


def stay_of(engine: SimEngine, kind: int = CLASS) -> int:
    return int(engine.index.table.stay[kind])


# ---- ages -------------------------------------------------------------------------------


def table_of(loops: Loops, policy: EvictionPolicy, ticks: int) -> PageTable:
    return PageTable(Geometry(PAGE, PAGE), 10, policy, AgeLimits(ticks=ticks), loops)


@BOTH
@given(
    kinds=st.lists(st.integers(0, 5), min_size=10, max_size=10),
    uses=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=5)),
        max_size=60,
    ),
)
def test_pages_expire_as_their_classes_do(
    loops: Loops, kinds: list[int], uses: list[tuple[int, int, list[int]]]
) -> None:
    """Two prompts of five pages; each use may change how long classes stay."""
    table = table_of(loops, EvictionPolicy.LEARNED, 1000)
    paths = [table.add_rows(np.empty(0, np.int64), np.full((5, PAGE), bit), None) for bit in (0, 1)]
    table.kind[np.concatenate(paths)] = kinds
    expires = np.zeros(10, dtype=np.int64)
    for which, count, stays in uses:
        table.stay[: len(stays)] = stays
        tick, rows = table.advance(), paths[which][:count]
        before = table.age.copy()
        table.use(rows)
        stay = table.stay[table.kind[rows]].tolist()
        expires[rows] = definitions.expiry(tick, stay, expires[rows].tolist())
        np.testing.assert_array_equal(table.age[rows] >> TICK_SHIFT, expires[rows])
        assert (table.age >= before).all()
        assert all((np.diff(table.age[path[table.age[path] > 0]]) < 0).all() for path in paths)


@BOTH
@given(uses=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), max_size=80))
def test_where_nothing_stays_it_is_least_recently_used(
    loops: Loops, uses: list[tuple[int, int]]
) -> None:
    tables = [table_of(loops, EvictionPolicy[name], 400) for name in ("LRU", "LEARNED")]
    for table in tables:
        for bit in (0, 1):
            table.add_rows(np.empty(0, np.int64), np.full((5, PAGE), bit), None)
        for which, count in uses:
            table.advance()
            table.use(np.arange(5 * which, 5 * which + count))
    np.testing.assert_array_equal(tables[0].age, tables[1].age)


@BOTH
def test_there_are_bits_for_what_expires_last(loops: Loops) -> None:
    """Ages have bits for 60 ticks: they are numbered anew while pages stay as long as they may."""
    table = table_of(loops, EvictionPolicy.LEARNED, 60)
    rows = [
        int(table.add_rows(np.empty(0, np.int64), np.full((1, PAGE), n), None)[0]) for n in (0, 1)
    ]
    table.kind[rows[1]] = 1
    table.stay[1] = table.longest_stay
    assert table.longest_stay == 7
    for _ in range(300):
        table.advance()
        table.use(np.array(rows[1:]))
        table.advance()
        table.use(np.array(rows[:1]))
        assert table.last_use(np.array(rows)).tolist() == [table.tick, table.tick - 1 + 7]
        assert (table.age >> TICK_SHIFT).max() < 60


# ---- what is learned ----------------------------------------------------------------------


def test_a_page_stays_until_it_is_worth_what_others_were_that_went() -> None:
    """Room for four prompts. Those that go are seven requests old, worth 90 and later 80; a page
    expires in the first bin in which it is worth no more."""
    values = [100, 99, 98, 97, 90, 90, 85, 80, 70, 60]
    retention = Told(0, values)
    engine = engine_that_is_told(retention)
    serve(engine, 0)
    assert engine.index.expiry.price == 0  # nothing went: whatever is worth something stays
    bins = len(values)
    assert stay_of(engine) == EDGES[bins]  # one tick so far, for one request
    for seed in range(1, 12):
        serve(engine, seed)
    price = engine.index.expiry.price
    assert price in values
    ages = [age for age in range(int(EDGES[bins])) if retention.estimate.value(CLASS, age) <= price]
    # a prompt takes two ticks of the table: it is computed, and ends
    assert stay_of(engine) == 2 * ages[0]
    assert stay_of(engine, UNKNOWN) == 0


def test_nothing_stays_while_least_recently_used_finds_more() -> None:
    retention = Told(1 << UNIT - 1, [100] * BINS)
    engine = engine_that_is_told(retention)
    serve(engine, 0)
    assert stay_of(engine) > 0
    retention.told = False
    serve(engine, 1)
    assert not engine.index.table.stay.any()
    assert engine.index.expiry.admits(np.arange(16)).all()


def test_a_flush_forgets_pages_and_not_the_traffic() -> None:
    engine = engine_that_is_told(Told(0, [100] * 5))
    for seed in range(3):
        serve(engine, seed)
    before = engine.index.table.stay.copy()
    engine.reset()
    np.testing.assert_array_equal(engine.index.table.stay, before)
    assert before[CLASS] > 0 and not engine.index.table.kind.any()


def test_pages_of_an_answer_are_not_asked_for() -> None:
    retention = Retention([64])
    first = np.arange(1, 9, dtype=np.uint64)
    # a first turn of four pages
    assert retention.request(first, 4).tolist() == [3] * 4 + [answer_class(0)] * 4
    # the next turn goes on after the prompt: with another answer than that
    again = np.concatenate((first[:4], np.arange(20, 26, dtype=np.uint64)))
    much = class_of(1, 8, 4, 0)
    assert retention.request(again, 8).tolist() == [much] * 8 + [answer_class(1)] * 2


def test_a_tail_has_the_class_of_the_page_before() -> None:
    """And a prompt of less than a page is none that could come back."""
    engine = SimEngine(Geometry(1, 16), Sizes(16, 16, eviction="learned"))
    for length in (5 * PAGE // 2, PAGE // 2):
        request = engine.start(prompt(3, length)[:length])
        engine.compute(request, length)
        engine.finish(request)
    table = engine.index.table
    rows = np.flatnonzero(table.kind)
    assert sorted(table.depth[rows].tolist()) == [0, 1, 2]
    assert len(set(table.kind[rows].tolist())) == 1
    assert engine.index.expiry.private_state()[0] == 1


def test_when_the_other_rule_decides_only_ends_of_prefixes_are_classified_anew() -> None:
    """Not all that the host has: it may be a million pages."""
    retention = Told(0, [100] * 5)
    engine = engine_that_is_told(retention, host_pages=32, host_window_pages=32)
    for seed in range(3):
        serve(engine, seed)
        engine.settle()
    known = np.concatenate([find(engine, prompt(4, seed)).rows for seed in range(3)])
    candidates, prospects = engine.index.residency.candidates, engine.index.table.prospects
    before = dict(candidates.look_at_tails().places)
    assert 1 < len(before) < len(known)
    looked: list[np.ndarray] = []
    candidates.tell_looked(looked.append)
    retention.told = False
    serve(engine, 9, pages=1)
    after = candidates.look_at_tails().places
    rows = list(before)
    told = prospects.places_of(np.array(rows))
    assert [after[row] for row in rows] == told != [before[row] for row in rows]
    assert looked and not np.isin(known, np.concatenate(looked)).any()


def test_above_a_host_pages_stay_as_long_as_those_that_leave() -> None:
    """Whatever is worth something would stay; but what it costs there is a load."""
    engine = engine_that_is_told(Told(0, [100] * 5), host_pages=32, host_window_pages=32)
    serve(engine, 0)
    assert stay_of(engine) == 0  # nobody has left yet
    table, expiry = engine.index.table, engine.index.expiry
    path = find(engine, prompt(4, 0)).rows
    idle = table.tick - int(table.last_use(path)[0])
    for _ in range(7):
        table.advance()
    expiry.note_left(path)
    serve(engine, 1)
    longest = idle + 7
    assert stay_of(engine) == longest
    for late in (-2, -100):
        table.age[path] = (table.now - late) << TICK_SHIFT  # they leave before they expire
        expiry.note_left(path)
        serve(engine, 2)
        longest = max(0, longest + late)
        assert stay_of(engine) == longest


def test_a_copy_stays_where_its_room_is_worth_less_than_to_write_it_again() -> None:
    expiry = engine_that_is_told(Told(0, [100] * 5), host_pages=32).index.expiry
    assert isinstance(expiry, Expiry)
    expiry._longest, expiry._ticks, expiry._requests = 400, 5, 1
    expiry.price = (1 << UNIT) // (32 * 80)
    expiry.price += 1
    assert not expiry.copies_stay
    expiry.price //= 2
    assert expiry.copies_stay
    retention = expiry._retention
    assert isinstance(retention, Told)
    retention.told = False
    assert not expiry.copies_stay


@pytest.mark.parametrize("pays", [False, True])
def test_windows_near_the_end_of_a_prompt_go_with_their_pages(
    monkeypatch: Patch, pays: bool
) -> None:
    """Three pages are near, and every second page ends a window that is worth a copy where
    prompts part from others behind it."""
    monkeypatch.setattr(window_module, "NEAR_END", 3 * PAGE)
    monkeypatch.setattr(window_module, "APART", 2 * PAGE)
    table = PageTable(Geometry(PAGE, 2 * PAGE), 10, EvictionPolicy.LEARNED)
    path = table.add_rows(np.empty(0, np.int64), np.full((7, PAGE), 1), None)
    slots = np.arange(7, dtype=np.int32)[:, None]
    table.swa_device.put(path, np.repeat(slots, table.geometry.slots_per_page, 1), ready=True)
    table.kind[path], table.stay[1] = 1, 5
    table.advance()
    table.use(path)
    table.keep_windows_near_end(path, copy_one=pays)
    expires = table.age[path]
    assert (table.swa_age[path[:4]] < INSIDE_BAND).all()
    assert table.swa_age[path[4]] == INSIDE_BAND + expires[4]
    assert (table.swa_age[path[5:]] == expires[5:]).all()  # the window at its end
    assert np.flatnonzero(table.resume[path]).tolist() == ([5, 6] if pays else [6])


def talk(engine: SimEngine, turn: int, *, edited: bool) -> None:
    """A prompt of three pages, and one more in each turn. An edited one parts from the last in its
    last page, which is that of the turn alone."""
    pages = 3 + turn
    tokens = np.arange(1, (pages + 1) * PAGE)
    if edited:
        tokens[(pages - 1) * PAGE :] += 1000 * (turn + 1)
    request = engine.start(tokens)
    engine.compute(request, len(tokens))
    engine.finish(request)


@pytest.mark.parametrize(
    ("edited", "window_cost", "pays"), [(True, 1, True), (True, 20, False), (False, 0, False)]
)
def test_one_of_them_is_copied_only_where_that_saves_more_than_it_takes(
    monkeypatch: Patch, edited: bool, window_cost: int, pays: bool
) -> None:
    """Eight pages lie between two windows."""
    monkeypatch.setattr(window_module, "APART", 2 * PAGE)
    sizes = Sizes(32, 32, eviction="learned")
    policy = dataclasses.replace(sizes.policy(), checkpoint_pages=8, window_cost=window_cost)
    monkeypatch.setattr(Sizes, "policy", lambda self: policy)
    engine, said = SimEngine(Geometry(PAGE, PAGE), sizes), list[bool]()
    keep = PageTable.keep_windows_near_end

    def watched(self: PageTable, path: Any, *, copy_one: bool) -> None:
        said.append(copy_one)
        keep(self, path, copy_one=copy_one)

    monkeypatch.setattr(PageTable, "keep_windows_near_end", watched)
    for turn in range(12):
        talk(engine, turn, edited=edited)
    assert not said[0], "nobody has come back yet"
    assert said[-1] == pays


# ---- without a host -----------------------------------------------------------------------


@given(data=st.data())
def test_what_is_worth_least_goes_and_nothing_before_what_is_below_it(data: st.DataObject) -> None:
    """Rows of a tree, of some classes and ages; they expire in any order that is leaf-first."""
    table = PageTable(Geometry(PAGE, PAGE), 12, EvictionPolicy.LEARNED)
    numbers = st.integers(0, 3)
    rows: list[int] = []
    for number in range(12):
        above = table.path(data.draw(st.sampled_from(rows))) if rows else np.empty(0, np.int64)
        rows += table.add_rows(above, np.full((1, PAGE), number), None).tolist()
    table.kind[rows] = data.draw(st.lists(numbers, min_size=12, max_size=12))
    table.used[rows] = data.draw(st.lists(numbers, min_size=12, max_size=12))
    ranks = np.array(data.draw(st.permutations(range(4 * BINS))), dtype=np.int32)
    pool = sorted(rows, key=lambda row: -int(table.depth[row]))[: data.draw(st.integers(0, 12))]
    least = np.empty(min(len(pool), data.draw(st.integers(0, 12))), dtype=np.int64)
    pages = table.parent, table.kind, table.used
    scratch = np.zeros(12, dtype=np.int32)
    least_worth(np.array(pool, dtype=np.int64), *pages, 4, ranks, scratch, least)
    told: Any = SimpleNamespace(requests_ended=4, estimate=SimpleNamespace(ranks=ranks))
    assert least.tolist() == definitions.least_worth(table, told, pool)(len(least))
    for i, row in enumerate(least.tolist()):
        assert not set(table.path(row)[:-1].tolist()) & set(least[:i].tolist())
    assert not scratch.any()


# ---- admission ------------------------------------------------------------------------------


def copied(chance: int) -> int:
    """Pages that are copied of prompts that leave the device, of as many as it has room for."""
    engine = engine_that_is_told(
        Told(chance, [100] * BINS), host_pages=32, host_window_pages=32, low_pages=8
    )
    # a request ends before anybody is asked, so nothing is copied at once
    engine.index.begin_backup = lambda rows: None  # type: ignore[method-assign]
    for seed in range(6):
        serve(engine, seed)
        engine.demote()
        engine.settle()
    return engine.index.counters.backed_up_pages


def test_what_is_not_expected_back_is_not_copied() -> None:
    assert copied(0) == 0
    assert copied(1 << (UNIT - 2)) > 0


def test_what_leads_to_something_on_the_host_is_copied_too() -> None:
    retention = Told(1 << (UNIT - 2), [100] * BINS)
    engine = engine_that_is_told(retention, host_pages=32, host_window_pages=32)
    serve(engine, 0)
    engine.settle()
    path = find(engine, prompt(4, 0)).rows
    engine.index.evict_device(1, 0)
    retention.estimate.chances[:] = 0
    serve(engine, 1)
    assert not engine.index.table.device.present[path[-1]]
    assert engine.index.expiry.admits(path).tolist() == [True, True, True, False]
    other = find(engine, prompt(4, 1)).rows
    assert not engine.index.expiry.admits(other).any()


# ---- all of it --------------------------------------------------------------------------------


def run_all_seeds(seeds: int = SEEDS) -> set[str]:
    # prompts are short here
    with patch.multiple(window_module, NEAR_END=48, APART=32):
        return run_seeds(seeds)


def run_seeds(seeds: int) -> set[str]:
    seen: set[str] = set()
    for seed in (*FIRST, *range(seeds)):
        simulation = Simulation(
            seed,
            ranks=1 + seed % 2,
            eviction="learned",
            modelled=seed % 3 != 0,
            storage=seed % 3 == 0,
            loops=(INTERPRETED, COMPILED),
        )
        simulation.run(STEPS)
        index = simulation.engine.index
        seen |= {name for name, count in index.counters.as_dict().items() if count}
        seen |= {"stays"} if index.table.stay.any() else set()
        price = isinstance(index.expiry, Expiry) and index.expiry.price
        seen |= {"price"} if price else set()
        seen |= {"near end"} if index.expiry.near_end_pays else set()
    return seen


def test_ranks_agree_and_the_model_too(full: bool) -> None:
    wanted = {"stays", "price", "near end"}
    wanted |= {"evicted_host_pages", "loaded_pages", "demoted_pages"}
    assert wanted <= run_all_seeds(SEEDS if full else FEW)


def a_use_may_bring_the_end_nearer(patch: Patch) -> None:
    original = INTERPRETED.paths._expire_later

    def later(c: Any, rows: Any, tick: int) -> None:
        c.age[rows] = 0
        original(c, rows, tick)

    patch.setattr(INTERPRETED.paths, "_expire_later", later)


def pages_expire_before_those_below_them(patch: Patch) -> None:
    def later(c: Any, rows: Any, tick: int) -> None:
        for row in rows:
            age = INTERPRETED.paths.age_of(c, row, tick + c.stay[c.kind[row]])
            c.age[row] = max(c.age[row], age)

    patch.setattr(INTERPRETED.paths, "_expire_later", later)


def what_goes_has_no_price(patch: Patch) -> None:
    patch.setattr(Expiry, "note_lost", lambda self, rows: None)


def what_expires_first_goes_first(patch: Patch) -> None:
    patch.setattr(Expiry, "least_worth", lambda self, rows, count: rows[:count])


def what_is_expected_back_is_not_copied(patch: Patch) -> None:
    original = Expiry.admits
    patch.setattr(Expiry, "admits", lambda self, rows: ~original(self, rows))


def windows_near_an_end_are_like_others(patch: Patch) -> None:
    patch.setattr(PageTable, "keep_windows_near_end", lambda self, path, *, copy_one: None)


def copies_go_first_where_they_stay(patch: Patch) -> None:
    original = HostRoom._stages

    def stages(self: HostRoom, space: Any, other: Any, pages: int, claim: Any, *args: Any) -> Any:
        yield lambda: self._drop_duplicates(space, pages - space.free_pages, claim.age)
        yield from original(self, space, other, pages, claim, *args)

    patch.setattr(HostRoom, "_stages", stages)


def a_rank_learns_for_itself(patch: Patch) -> None:
    original = expiry_module.Expiry._learn
    turns = iter(range(1 << 30))

    def learn(self: Expiry) -> None:
        original(self)
        self.price += next(turns) % 2

    patch.setattr(Expiry, "_learn", learn)


BUGS: list[Callable[[Patch], None]] = [
    a_use_may_bring_the_end_nearer,
    pages_expire_before_those_below_them,
    what_goes_has_no_price,
    what_expires_first_goes_first,
    what_is_expected_back_is_not_copied,
    windows_near_an_end_are_like_others,
    copies_go_first_where_they_stay,
    a_rank_learns_for_itself,
]


@pytest.mark.parametrize("seed_bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_is_found(seed_bug: Callable[[Patch], None], monkeypatch: Patch, full: bool) -> None:
    seed_bug(monkeypatch)
    with pytest.raises(AssertionError):
        assert "price" in run_all_seeds(SEEDS if full else FEW)
