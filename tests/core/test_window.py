"""The resume rule against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.geometry import Geometry
from sglang_ext.core.window import checkpoint_windows, deepest_resume


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 14))
def test_deepest_resume_is_the_definition(has_window: list[bool], window_pages: int) -> None:
    deepest = max(
        j for j in range(len(has_window) + 1) if all(has_window[max(0, j - window_pages) : j])
    )
    assert deepest_resume(np.array(has_window, dtype=bool), window_pages) == deepest


@given(
    first=st.integers(0, 20),
    grown=st.integers(1, 20),
    interval=st.integers(1, 8),
    window_pages=st.integers(1, 4),
)
def test_checkpoints_bound_the_recompute_after_a_branch(
    first: int, grown: int, interval: int, window_pages: int
) -> None:
    end = first + grown
    windows = list(checkpoint_windows(first, end, interval, window_pages))
    assert windows[0] == (max(0, end - window_pages), end)
    ends = {stop for _, stop in windows}
    for branch in range(first + interval, end + 1):
        assert any(branch - interval < stop <= branch for stop in ends)
    assert all(start == max(0, stop - window_pages) for start, stop in windows)


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
