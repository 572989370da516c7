"""Depth-first order of waiting requests."""

import numpy as np

from sglang_ext.adapter.batch_order import heaviest_first


def test_the_prefix_shared_by_most_comes_first_and_deeper_before_shallower() -> None:
    paths = [[1], [2, 3], [2, 4], [2, 4], [], [2]]
    order = heaviest_first([np.array(p, dtype=np.int64) for p in paths])
    assert order == [2, 3, 1, 5, 0, 4]
