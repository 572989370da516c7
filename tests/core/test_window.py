"""The resume rule against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ext.core.compiled import windows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import complete_windows, deepest_resume
from sglang_ext.testing import definitions
from sglang_ext.testing.interpreted import INTERPRETED

Mask = NDArray[np.bool_]


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 14))
def test_deepest_resume_is_the_definition(has_window: list[bool], window_pages: int) -> None:
    deepest = definitions.deepest_resume(has_window, window_pages)
    assert deepest_resume(np.array(has_window, dtype=bool), window_pages) == deepest


PATHS = st.lists(st.tuples(*[st.booleans()] * 3), min_size=1, max_size=24)


def masks(path: list[tuple[bool, bool, bool]]) -> tuple[Mask, Mask, Mask]:
    marked, branches, complete = np.array(path, dtype=bool).T.copy()
    return marked, branches, complete


def resume_points(marked: Mask, branches: Mask, complete: Mask, interval: int) -> Mask:
    """Of the compiled loop."""
    keep: Mask = branches & complete
    windows.resume_points(marked, complete, interval, keep)
    return keep


@given(PATHS, st.integers(0, 8))
def test_resume_points_are_the_definition(
    path: list[tuple[bool, bool, bool]], interval: int
) -> None:
    marked, branches, complete = masks(path)
    expected = definitions.resume_points(
        marked.tolist(), branches.tolist(), complete.tolist(), interval
    )
    assert resume_points(marked, branches, complete, interval).tolist() == expected
    interpreted = branches & complete
    INTERPRETED.windows.resume_points(marked, complete, interval, interpreted)
    assert interpreted.tolist() == expected


def longest_gap(points: Mask) -> int:
    """Pages between neighbouring resume points, the beginning and the end among them."""
    return int(np.diff([0, *(np.flatnonzero(points) + 1), len(points)]).max())


@given(PATHS, st.integers(1, 8))
def test_resume_points_bound_the_recompute(
    path: list[tuple[bool, bool, bool]], interval: int
) -> None:
    marked, branches, complete = masks(path)
    points = resume_points(marked, branches, complete, interval)
    assert not (points & ~complete).any()
    # no further apart than the windows that exist allow
    assert longest_gap(points) <= max(interval, longest_gap(complete))


@given(PATHS, st.integers(0, 8))
def test_the_end_and_the_branches_of_a_path_stay(
    path: list[tuple[bool, bool, bool]], interval: int
) -> None:
    marked, branches, complete = masks(path)
    points = resume_points(marked, branches, complete, interval)
    assert points[-1] == complete[-1]
    assert not (branches & complete & ~points).any()
    if interval == 0:
        others = points & ~branches
        others[-1] = False
        assert not others.any()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 8))
def test_turns_of_a_conversation_are_thinned_to_the_interval(
    turns: int, turn: int, interval: int
) -> None:
    marked = np.zeros(0, dtype=bool)
    for _ in range(turns):
        marked = np.append(marked, np.zeros(turn, dtype=bool))
        marked = resume_points(marked, np.zeros_like(marked), np.ones_like(marked), interval)
    pages = turns * turn
    assert longest_gap(marked) <= interval
    assert marked.sum() <= 2 * pages // interval + 2


@given(PATHS, st.integers(1, 5))
def test_complete_windows_are_the_definition(
    path: list[tuple[bool, bool, bool]], size: int
) -> None:
    has = masks(path)[0]
    assert complete_windows(has, size).tolist() == definitions.complete_windows(has.tolist(), size)


@given(device_page=st.integers(1, 64), window=st.integers(1, 300), position=st.integers(0, 999))
def test_the_engine_keeps_the_window_of_the_last_boundary(
    device_page: int, window: int, position: int
) -> None:
    geometry = Geometry(device_page, window)
    page = geometry.page_tokens
    assert page >= 16 and page % device_page == 0
    # What free_swa_out_of_window_slots keeps when the sequence has position + 1 tokens.
    kept = max(geometry.retained_tokens, device_page)
    freed_below = (position - -(-kept // device_page) * device_page) // device_page * device_page
    boundary = (position + 1) // page * page
    assert freed_below <= max(0, boundary - geometry.window_pages * page)
