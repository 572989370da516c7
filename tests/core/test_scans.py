"""Slots of a row of token indices, and their peers, by definition."""

import numpy as np
import pytest

from sglang_ext.core.compiled.scans import clear_rows, slots_with_peers

PAGES = 12


@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize("without", [None, 0, PAGES - 1])
def test_slots_and_peers_are_those_of_the_first_tokens(page: int, without: int | None) -> None:
    rng = np.random.default_rng(page)
    slots, windows = (rng.permutation(np.arange(1, 40))[:PAGES] for _ in range(2))
    if without is not None:
        windows[without] = 0
    tokens = (slots[:, None] * page + np.arange(page)).astype(np.int32).reshape(-1)
    peers = np.zeros(40 * page, dtype=np.int64)
    peers[tokens] = (windows[:, None] * page + np.arange(page) * (windows > 0)[:, None]).reshape(-1)
    full, swa = np.empty((2, PAGES), dtype=np.int32)
    assert slots_with_peers(tokens, peers, page, full, swa) == (without is None)
    assert full.tolist() == slots.tolist() and swa.tolist() == windows.tolist()


@pytest.mark.parametrize("width", [1, 16])
def test_rows_are_cleared_and_no_others(width: int) -> None:
    array = np.arange(1, 1 + 9 * width).reshape(9, width)
    expected = array.copy()
    expected[[7, 2]] = 0
    clear_rows(array, np.array([7, 2], dtype=np.int32))
    np.testing.assert_array_equal(array, expected)
