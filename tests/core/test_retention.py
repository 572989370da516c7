"""What is learned, who decides, and how soon: against brute force, and with bugs put in."""

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from launch.bench.page_paths import Trace
from launch.bench.retention import one_tier, two_tiers
from launch.bench.stress import cycle, once, popular, recency
from sglang_ext.core.compiled import returns as loops
from sglang_ext.core.compiled.bins import BINS, EDGES
from sglang_ext.core.compiled.marks import next_mark, sampled
from sglang_ext.core.retention.duel import Duel
from sglang_ext.core.retention.estimate import Estimate, class_name
from sglang_ext.core.retention.retention import REBUILD, Retention
from sglang_ext.core.retention.returns import Returns
from tests.core import retention_model as model

ONE = 1 << loops.ONE_BITS
UNIT = 1 << loops.UNIT


def path(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, dtype=np.uint64)


def test_what_came_back_and_what_did_not_count_as_in_a_life_table() -> None:
    """Paths of one page each: every use begins a life, which the next use or the end ends."""
    random = np.random.default_rng(1)
    returns, table = Returns(4096), model.LifeTable()
    tables: dict[int, model.LifeTable] = {}
    last: dict[int, tuple[int, int]] = {}
    for tick in range(1, 900):
        page = int(random.zipf(1.4)) if random.random() < 0.7 else 10_000 + tick
        kind = int(returns.observe(path(page), 1, tick)[0])
        if page in last:
            start, was = last[page]
            tables.setdefault(was, model.LifeTable()).life(start, tick, 1, returned=True)
        last[page] = tick, kind
    for start, kind in last.values():
        tables.setdefault(kind, model.LifeTable()).life(start, 899, 1, returned=False)
    returns.estimate(899)
    for kind, table in tables.items():
        # events fade before the ticks of the last while are added: from what they were
        np.testing.assert_allclose(
            returns.events[kind], [ONE * n - (ONE * n >> loops.DECAY) for n in table.events]
        )
    censored = {kind: np.zeros(BINS, dtype=np.int64) for kind in tables}
    for start, kind in last.values():
        for age in range(1, 899 - start + 1):
            censored[kind][model.bin_of(age)] += ONE
    for kind, table in tables.items():
        came_back = np.array(table.exposure) * ONE - censored[kind]
        expected = came_back - (came_back >> loops.DECAY) + censored[kind]
        np.testing.assert_array_equal(returns.exposure[kind], expected)


def test_exposure_is_counted_once_however_often_the_table_is_built() -> None:
    returns = Returns(64)
    returns.observe(path(1), 1, 1)
    for tick in (5, 9, 30):
        returns.estimate(tick)
    before = returns.exposure.copy()
    returns.observe(path(1), 1, 40)
    added = returns.exposure - before
    assert added.sum() == ONE * 10  # ticks 31 to 40
    assert returns.events.sum() == ONE
    assert returns.events[1, model.bin_of(39)] == ONE


def test_worth_is_the_best_horizon() -> None:
    random = np.random.default_rng(2)
    chances = (random.random((loops.CLASSES, BINS)) ** 3 * UNIT).astype(np.int64)
    chances[0] = 0
    values = np.empty_like(chances)
    loops.worth(chances, values)
    for kind in range(4):
        exact = [Fraction(int(chance), UNIT) for chance in chances[kind]]
        for start in range(BINS):
            assert values[kind, start] == pytest.approx(
                float(model.index(exact, start) * UNIT), rel=1e-3, abs=2
            )


def test_a_steady_chance_is_what_a_page_is_worth_at_any_age() -> None:
    events = np.zeros((loops.CLASSES, BINS), dtype=np.int64)
    exposure = np.zeros_like(events)
    exposure[:] = np.diff(EDGES) * (ONE * 100_000)
    events[:] = exposure // 500
    chances, values = np.empty_like(events), np.empty_like(events)
    loops.chances(events, exposure, loops.PRIOR, chances)
    loops.worth(chances, values)
    np.testing.assert_allclose(values[:, :-4] / UNIT, 1 / 500, rtol=0.05)


def test_a_class_that_was_never_seen_is_like_all_others() -> None:
    events = np.zeros((loops.CLASSES, BINS), dtype=np.int64)
    exposure = np.zeros_like(events)
    exposure[3] = np.diff(EDGES) * (ONE * 1000)
    events[3] = exposure[3] // 200
    chances = np.empty_like(events)
    loops.chances(events, exposure, loops.PRIOR, chances)
    np.testing.assert_allclose(chances[9], chances[3], rtol=0.1)


def test_where_prompts_part_from_those_that_they_go_on_from() -> None:
    """Near the end is behind the last multiple of four pages."""
    returns = Returns(4096)

    def told(pages: list[int], prompt: int | None = None) -> tuple[int, int]:
        before = returns.ends
        returns.observe(path(*pages), prompt or len(pages), 1, 4)
        ends, near = (now - then for now, then in zip(returns.ends, before, strict=True))
        return ends // ONE, near // ONE

    first = list(range(1, 11))
    assert told([*first, 11], prompt=10) == (0, 0)  # nobody was there before
    assert told([*first, 11, 12, 13]) == (1, 0)  # from the end, and the answer
    assert told([*first, 11, 12, 20]) == (1, 1)  # of 13 pages, behind the 12th
    assert told([*first, 11, 30, 31]) == (0, 0)  # of 13 pages, before the 12th
    assert told(first[:2]) == (0, 0)
    assert told([*first[:2], 40, 41, 42]) == (1, 0)
    # what is shorter than that has no window near its end
    assert told([50, 51, 52]) == (0, 0)
    assert told([50, 51, 53]) == (0, 0)


def test_where_prompts_part_is_forgotten_too() -> None:
    returns = Returns(4096)
    for tick in range(1, 65):
        returns.observe(path(1, 2, 3, tick + 10), 4, tick, 2)
    before = returns.ends
    assert before == (63 * ONE, 63 * ONE)
    returns.estimate(64)
    assert returns.ends == tuple(count - (count >> loops.DECAY) for count in before)


def test_classes_are_turns_lengths_and_forks() -> None:
    returns = Returns(4096)

    def observe(pages: list[int], tick: int) -> list[int]:
        kinds: list[int] = returns.observe(path(*pages), len(pages), tick).tolist()
        return kinds

    first = list(range(1, 8))
    assert set(observe(first, 1)) == {loops.class_of(0, 7, 7, 0)}
    second = [*first, 8, 9]
    assert set(observe(second, 2)) == {loops.class_of(1, 9, 2, 0)}
    third = [*second, 10, 11, 12, 13]
    assert set(observe(third, 3)) == {loops.class_of(2, 13, 4, 0)}
    # another conversation begins with the first two pages
    kinds = observe([1, 2, 50, 51], 4)
    assert kinds == [loops.class_of(0, 4, 2, 1)] * 2 + [loops.class_of(0, 4, 2, 0)] * 2
    # the last turn of the first one is edited
    assert observe([*third[:10], 21, 22], 5)[-1] == loops.class_of(2, 12, 2, 0)
    # of turns that add little, and of those that add much
    assert loops.class_of(1, 9, 2, 0) != loops.class_of(1, 9, 3, 0)
    names = [class_name(kind) for kind in range(loops.CLASSES)]
    assert len(set(names)) == loops.CLASSES


def test_answers_have_classes_of_their_own() -> None:
    """Also where few pages of a long path are remembered, up to the page where they begin."""
    returns, prompt = Returns(4096), 1021
    pages = np.arange(1, 1101, dtype=np.uint64)
    kinds = returns.observe(pages, prompt, 1)
    assert set(kinds[:prompt]) == {loops.class_of(0, prompt, prompt, 0)}
    assert set(kinds[prompt:]) == {loops.answer_class(0)}
    # the next prompt contains the answer, or another one
    for tick, answer in ((2, pages[prompt:]), (3, np.arange(5000, 5030, dtype=np.uint64))):
        before = returns.events[loops.answer_class(0)].sum()
        following = np.concatenate((pages[:prompt], answer))
        returns.observe(following, len(following), tick)
        came_back = returns.events[loops.answer_class(0)].sum() - before
        # up to the last page that is remembered
        assert came_back == (ONE * (1088 - prompt) if tick == 2 else 0)


def test_an_answer_is_no_part_of_the_turn_that_it_belongs_to() -> None:
    """The next turn goes on from the prompt, whether it has the answer in it or not."""
    returns = Returns(4096)
    returns.observe(path(1, 2, 3, 4, 90), 4, 1)
    without = returns.observe(path(1, 2, 3, 4, 91, 92), 6, 2)
    assert set(without) == {loops.class_of(1, 6, 2, 0)}
    returns.observe(path(11, 12, 13, 14, 95), 4, 3)
    within = returns.observe(path(11, 12, 13, 14, 95, 96), 6, 4)
    assert set(within) == {loops.class_of(1, 6, 1, 0)}


def test_what_was_counted_in_one_bin_says_something_of_those_beside_it() -> None:
    """And as much in all as was counted, if bins are as wide."""
    exposure = np.zeros((loops.CLASSES, BINS), dtype=np.int64)
    exposure[5] = np.diff(EDGES) * (ONE * 1_000_000)
    events = np.zeros_like(exposure)
    events[5, 24] = ONE * 8000
    chances = np.empty_like(events)
    loops.chances(events, exposure, loops.PRIOR, chances)
    per_tick = chances[5] / np.diff(EDGES)
    nearest = np.argsort(-per_tick)[:5]
    assert nearest[0] == 24 and set(nearest) == {22, 23, 24, 25, 26}
    assert per_tick[[16, 32]].max() < per_tick[24] / 20
    assert per_tick[24] == pytest.approx(0.196 * 8000 / 1_000_000 / np.diff(EDGES)[24] * UNIT, 0.05)


def test_a_history_forgets_and_stays_small() -> None:
    returns = Returns(1)
    for tick in range(1, 9000):
        returns.observe(path(tick), 1, tick)
    assert returns.estimate(9000).values.max() == 0
    returns.observe(path(1), 1, 9001)  # long forgotten
    assert returns.events.sum() == 0


def test_marks_are_all_of_the_first_pages_and_few_of_many() -> None:
    marks = [next_mark(-1)]
    while (following := next_mark(marks[-1])) < 4096:
        marks.append(following)
    assert marks[:32] == list(range(32))
    assert len(marks) == 32 + 7 * 32
    gaps = np.diff(marks)
    assert np.all(gaps <= np.maximum(1, np.array(marks[1:]) // 16))
    digests = np.random.default_rng(1).integers(1, 1 << 63, 4096, dtype=np.uint64)
    depths, pages = sampled(digests, 0)
    assert depths.tolist() == marks and pages.sum() == marks[-1] + 1
    few, _ = sampled(digests, 2)
    assert set(few) < set(depths) and 40 < len(few) < 100
    shorter, _ = sampled(digests[:1000], 2)
    assert shorter.tolist() == [depth for depth in few if depth < 1000]


def test_depth_makes_a_page_worth_more_where_attention_counts() -> None:
    chances = np.full((loops.CLASSES, BINS), UNIT // 100, dtype=np.int64)
    depths = np.arange(loops.CLASSES, dtype=np.int64) * 100
    flat, steep = Estimate.of(chances, depths), Estimate.of(chances, depths, depth_cost=100)
    assert np.all(flat.values == flat.values[0])
    np.testing.assert_allclose(steep.values[3] / flat.values[3], 4, rtol=0.01)


# ---- who decides ----------------------------------------------------------------------


def replay(duel: Duel, trace: Trace, tick: int, estimate: Estimate, requests: range) -> None:
    digests = trace.digests()
    for i in requests:
        kinds = np.zeros(len(trace.paths[i]), dtype=np.int16)
        duel.request(digests[trace.paths[i]], kinds, tick + i, estimate)


def test_until_something_is_learned_the_least_recently_used_goes() -> None:
    retention = Retention([100])
    digests = np.arange(1, 8 * REBUILD, dtype=np.uint64)
    for i in range(REBUILD - 1):
        retention.request(digests[8 * i : 8 * i + 8])
        assert not retention.learned(0)


@pytest.mark.parametrize("tokens", [16_384, 65_536])
def test_a_cold_start_is_least_recently_used(tokens: int) -> None:
    start = popular(requests=REBUILD - 1)
    assert (
        one_tier(start, tokens, "learned")["hit_rate"] == one_tier(start, tokens, "lru")["hit_rate"]
    )


def rates(trace: Trace, tokens: int) -> tuple[float, float]:
    return one_tier(trace, tokens, "lru")["hit_rate"], one_tier(trace, tokens, "learned")[
        "hit_rate"
    ]


@pytest.mark.parametrize("tokens", [16_384, 32_768, 65_536])
def test_where_least_recently_used_is_right_nothing_is_lost(tokens: int) -> None:
    lru, learned = rates(recency(requests=4000), tokens)
    assert learned >= 0.99 * lru


@pytest.mark.parametrize(("traffic", "times"), [(popular, 1.15), (once, 1.5)])
def test_where_it_is_wrong_much_is_won(traffic: type, times: float) -> None:
    lru, learned = rates(traffic(requests=4000), 32_768)
    assert learned > times * lru


def test_round_and_round_what_is_kept_is_found() -> None:
    """150 prompts in turn, room for a third of them: of these two thirds are found at least."""
    lru, learned = rates(cycle(requests=4000), 32_768)
    assert lru == 0 and learned > 0.2


def test_what_was_learned_of_other_traffic_does_no_harm_for_long() -> None:
    """Round and round, then by recency: 2,000 requests after the change as much is found as by
    least recently used."""
    around, near = cycle(requests=2000), recency(requests=4000)
    first = len(around.parent)
    parent = np.concatenate((around.parent, np.where(near.parent < 0, -1, near.parent + first)))
    paths = [*around.paths, *(pages + np.int32(first) for pages in near.paths)]
    trace = Trace(
        paths, np.concatenate((around.tokens, near.tokens)), parent.astype(np.int32), near.page
    )
    before = trace.part(range(4000))

    def late(rule: str) -> float:
        hits = [
            one_tier(part, 32_768, rule)["hit_rate"] * int(part.tokens.sum())
            for part in (before, trace)
        ]
        return hits[1] - hits[0]

    assert late("learned") >= 0.97 * late("lru")


def test_the_duel_changes_sides_with_what_was_found() -> None:
    """A table on which what was used last goes first finds more in a cycle than least recently
    used does, and less by recency."""
    values = np.tile(np.arange(BINS, dtype=np.int64), (loops.CLASSES, 1))
    worst = Estimate.of(np.zeros_like(values), np.zeros(loops.CLASSES, dtype=np.int64))
    cells = np.lexsort((np.zeros(values.size), values.ravel())).astype(np.int32)
    ranks = np.empty_like(cells)
    ranks[cells] = np.arange(len(cells), dtype=np.int32)
    young_first = Estimate(worst.chances, values, cells, ranks)
    duel, around = Duel(256), cycle(requests=1000, prompts=60)
    replay(duel, around, 1, young_first, range(1000))
    duel.settle()
    assert duel.learned and duel.found[1] > duel.found[0]
    near = recency(requests=6000, mean=15)
    settled = []
    for start in range(0, 6000, REBUILD):
        replay(duel, near, 10_000, young_first, range(start, start + REBUILD))
        duel.settle()
        settled.append(duel.learned)
    assert not any(settled[10:])  # 2,000 requests, and no way back


# ---- admission ------------------------------------------------------------------------


def test_what_is_not_expected_back_is_not_copied() -> None:
    trace = once(requests=4000)
    everything = two_tiers(trace, 16_384, 32_768, "lru")
    learned = two_tiers(trace, 16_384, 32_768, "learned")
    assert learned["written_per_loaded"] < 0.5 * everything["written_per_loaded"]
    assert learned["hit_rate"] > everything["hit_rate"]


def test_as_long_as_nothing_is_known_everything_is_copied() -> None:
    retention = Retention([100, 300])
    assert retention.worth_admission(1, kind=0, used=0)


def test_chances_end_where_a_page_is_worth_less_than_what_makes_room() -> None:
    chances = np.full((loops.CLASSES, BINS), UNIT // 2, dtype=np.int64)
    values = np.tile(np.arange(BINS, 0, -1, dtype=np.int64), (loops.CLASSES, 1))
    order = np.arange(values.size, dtype=np.int32)
    estimate = Estimate(chances, values, order, order)
    assert estimate.returns_while_worth(0, 0, BINS) == 0
    assert estimate.returns_while_worth(0, 0, BINS - 1) == UNIT // 2
    assert estimate.returns_while_worth(0, 0, BINS - 2) == UNIT * 3 // 4
    assert estimate.returns_while_worth(0, 1, BINS - 2) == UNIT // 2


def test_what_is_learned_can_be_told() -> None:
    retention = Retention([500])
    trace = popular(requests=1000)
    digests = trace.digests()
    for pages in trace.paths:
        retention.request(digests[pages])
    rows = retention.estimate.explain()
    assert len(rows) == loops.CLASSES
    assert any(row["returns"] > 0.5 for row in rows)


def test_ranks_that_see_the_same_requests_agree() -> None:
    trace = popular(requests=1500)
    digests = trace.digests()
    one, other = Retention([300, 900]), Retention([300, 900])
    for pages in trace.paths:
        np.testing.assert_array_equal(one.request(digests[pages]), other.request(digests[pages]))
    np.testing.assert_array_equal(one.estimate.values, other.estimate.values)
    assert one.estimate.values.dtype == np.int64
    assert one.found(0) == other.found(0)
