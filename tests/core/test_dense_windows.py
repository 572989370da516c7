"""Windows inside a prompt that are kept as long as there is room: dense then, the first to go."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.plan import Transfer
from sglang_ext.core.table.window import dense_points
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import SimRequest
from tests.core.test_index import PAGE, engine_with, prompt, serve
from tests.failures.scenarios import join, rows_of

LONG = prompt(24, 1)
SHARED = pytest.mark.parametrize("extent_pages", [0, 2])


def engine_for(host_pages: int, **sizes: Any) -> SimEngine:
    """Windows of 2 pages; 4 pages apart where there is room, and without it only at ends."""
    defaults: dict[str, Any] = {
        "device_pages": 60,
        "device_window_pages": 60,
        "host_pages": host_pages,
        "host_window_pages": host_pages,
        "checkpoint_pages": 0,
        "dense_pages": 4,
        "pinned_share": 1,
    }
    return engine_with(WholeChunks, **{**defaults, **sizes})


class WholeChunks(SimEngine):
    """Keeps the sliding-window KV of a chunk until it is in the table, as the engine does."""

    def _slide(self, request: SimRequest) -> None:
        pass


def kept_at(engine: SimEngine, tokens: Any) -> list[int]:
    """Boundaries of a prompt whose windows the host keeps."""
    return (np.flatnonzero(engine.index.kept.ends[rows_of(engine, tokens)]) + 1).tolist()


def back_up(engine: SimEngine, tokens: Any) -> None:
    serve(engine, tokens)
    engine.settle()
    engine.check()


@SHARED
def test_they_are_dense_where_there_is_room(extent_pages: int) -> None:
    engine = engine_for(60, extent_pages=extent_pages)
    back_up(engine, LONG)
    assert kept_at(engine, LONG) == [4, 8, 12, 16, 20, 24]
    engine.index.evict_device(60, 60)
    branch = join(LONG[: 11 * PAGE], prompt(3, 2))
    request = engine.start(branch)
    assert request.protected == 8  # of the 11 pages that are cached
    engine.compute(request, len(branch))
    engine.finish(request)


def test_nothing_gives_way_to_them() -> None:
    """They take room as long as there is more of it than is taken, of either component."""
    for host_pages, host_window_pages, kept in (
        (52, 8, [4, 8, 24]),
        (52, 3, [24]),
        (40, 60, [24]),
    ):
        engine = engine_for(host_pages, host_window_pages=host_window_pages)
        back_up(engine, LONG)
        assert kept_at(engine, LONG) == kept


@SHARED
def test_they_go_before_everything_else(extent_pages: int) -> None:
    """Early copies, which take nothing else away, take their place: they keep as many prompts as
    without such windows."""

    def kept_prompts(dense: int) -> int:
        engine = engine_for(60, extent_pages=extent_pages, host_window_pages=20, dense_pages=dense)
        prompts = [prompt(12, seed) for seed in range(6)]
        for tokens in prompts:
            back_up(engine, tokens)
        engine.check_every_slot()
        return sum(12 in kept_at(engine, tokens) for tokens in prompts)

    assert kept_prompts(4) == kept_prompts(0) > 1


def test_a_copy_before_an_eviction_takes_their_place() -> None:
    engine = engine_for(60, host_window_pages=8)
    back_up(engine, LONG)
    before = kept_at(engine, LONG)
    assert len(before) > 1
    index = engine.index
    others = prompt(12, 2)
    serve(engine, others)
    plan = index.backups.begin(rows_of(engine, others), make_room=True)
    assert plan is None or isinstance(plan, Transfer)
    engine.settle()
    assert 12 in kept_at(engine, others) and 24 in kept_at(engine, LONG)


def test_one_that_was_used_is_kept_like_others() -> None:
    engine = engine_for(60)
    back_up(engine, LONG)
    back_up(engine, np.concatenate((LONG[: 8 * PAGE], prompt(3, 2))))
    index = engine.index
    assert 8 in kept_at(engine, LONG)
    while index.room.drop_spare():
        engine.check()
    assert kept_at(engine, LONG) == [8, 24]
    assert not index.kept.beyond


def test_those_not_used_for_longest_go_first() -> None:
    engine = engine_for(400, device_pages=200, device_window_pages=200)
    for seed in range(6):
        back_up(engine, prompt(24, seed))
    serve(engine, prompt(24, 0))
    for _ in range(8):  # a sixteenth each time
        assert engine.index.room.drop_spare()
    left = [len(kept_at(engine, prompt(24, seed))) for seed in range(6)]
    assert left[0] == 6, "of the prompt that was used last"
    assert left[1] == 1


@given(
    kept=st.lists(st.booleans(), max_size=60),
    complete=st.lists(st.booleans(), min_size=60, max_size=60),
    interval=st.integers(1, 20),
)
def test_no_two_are_further_apart_than_they_must_be(
    kept: list[bool], complete: list[bool], interval: int
) -> None:
    there = np.array(complete[: len(kept)], dtype=bool)
    marked = np.array(kept, dtype=bool)
    points = dense_points(marked, there, interval)
    assert all(there[point - 1] and not marked[point - 1] for point in points)
    every = sorted({0, *points, *(np.flatnonzero(marked) + 1).tolist(), len(kept)})
    for above, below in itertools.pairwise(every):
        # further only where nothing is complete within the interval
        assert below - above <= interval or not there[above : above + interval].any()
