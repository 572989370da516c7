"""What open sessions have used goes after everything else."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.failures.scenarios import PAGE, join, prompt, rows_of


def engine_of(device_pages: int = 40) -> SimEngine:
    """By sessions, with pages of ``PAGE`` tokens."""
    return SimEngine(Geometry(PAGE, 32), Sizes(device_pages, 40, eviction="sessions"))


def compute(engine: SimEngine, tokens: np.ndarray, session: str | None = None) -> None:
    """One request, of a session or of none."""
    request = engine.start(tokens)
    engine.compute(request, len(tokens))
    engine.finish(request)
    if session is not None:
        engine.index.sessions.use(session, rows_of(engine, tokens))


def oldest_first(engine: SimEngine, prompts: Sequence[np.ndarray]) -> list[int]:
    """Which of the prompts goes first, by the age of its last page, and so on."""
    last = [rows_of(engine, tokens)[-1] for tokens in prompts]
    return np.argsort(engine.index.table.age[last]).tolist()


def test_pages_of_an_open_session_go_last_and_by_recency_when_it_is_closed() -> None:
    engine = engine_of()
    prompts = [prompt(4, seed) for seed in (1, 2, 3)]
    for tokens, session in zip(prompts, ("one", None, "two"), strict=True):
        compute(engine, tokens, session)
    assert oldest_first(engine, prompts) == [1, 0, 2]
    engine.index.sessions.close("two")
    assert oldest_first(engine, prompts) == [1, 2, 0]
    engine.index.sessions.close("one")
    assert oldest_first(engine, prompts) == [0, 1, 2]
    engine.check_idle()


def test_what_two_sessions_share_stays_until_both_are_closed() -> None:
    engine = engine_of()
    shared, other = prompt(2, 1), prompt(2, 9)
    ends = [join(shared, prompt(2, seed)) for seed in (2, 3)]
    compute(engine, ends[0], "one")
    compute(engine, ends[1], "two")
    compute(engine, other)
    engine.index.sessions.close("one")
    assert oldest_first(engine, [*ends, shared, other]) == [0, 3, 1, 2]
    engine.index.sessions.close("two")
    assert oldest_first(engine, [*ends, shared, other]) == [0, 1, 2, 3]


def test_all_branches_of_a_session_are_kept() -> None:
    engine = engine_of()
    branches = [join(prompt(2, 1), prompt(2, seed)) for seed in (2, 3)]
    for tokens in branches:
        compute(engine, tokens, "one")
        compute(engine, tokens, "one")
    compute(engine, prompt(4, 9))
    assert oldest_first(engine, [*branches, prompt(4, 9)]) == [2, 0, 1]
    engine.index.sessions.close("one")
    assert oldest_first(engine, [*branches, prompt(4, 9)]) == [0, 1, 2]


def test_a_session_tells_nothing_of_who_has_its_rows_now() -> None:
    engine = engine_of(device_pages=5)
    compute(engine, prompt(4, 1), "one")
    compute(engine, prompt(4, 2), "two")  # in the same rows: there is one more
    assert len(rows_of(engine, prompt(4, 1))) == 0
    engine.index.sessions.close("one")
    assert (engine.index.table.priority[rows_of(engine, prompt(4, 2))] == 1).all()
    engine.index.sessions.close("two")
    assert (engine.index.table.priority[rows_of(engine, prompt(4, 2))] == 0).all()
    engine.check_idle()


CALLS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=25,
)


@given(CALLS)
def test_leaves_go_first_whatever_is_opened_and_closed(
    calls: list[tuple[str, int, int, bool]],
) -> None:
    engine = engine_of()
    trunk = prompt(3, 1)
    for session, pages, branch, closes in calls:
        if closes:
            engine.index.sessions.close(session)
        else:
            compute(engine, join(trunk, prompt(3, 10 + branch))[: pages * PAGE], session)
        for seed in range(3):
            rows = rows_of(engine, join(trunk, prompt(3, 10 + seed)))
            assert (np.diff(engine.index.table.age[rows]) < 0).all()
            assert (np.diff(engine.index.table.priority[rows]) <= 0).all()
    for session in "abc":
        engine.index.sessions.close(session)
    assert not engine.index.table.priority.any()
    engine.check_idle()
