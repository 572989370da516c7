"""Page digests: of a prompt at once, and of its pages one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable
from sglang_ext.testing.interpreted import INTERPRETED

MASK = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15


def mixed(value: int) -> int:
    """The finalizer of splitmix64, in numbers that have no end."""
    value = value + 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def digests(pages: NDArray[np.int64], weights: list[int], root: int) -> list[int]:
    """By the formula in ``core.table.digest``."""
    digest, found = mixed(~root & MASK), []
    for depth, page in enumerate(pages.tolist()):
        raw = sum(token * weight for token, weight in zip(page, weights, strict=True))
        digest = digest + mixed(raw & MASK) * pow(BASE, depth, 1 << 64) & MASK
        found.append(digest)
    return found


@given(
    page=st.sampled_from([16, 64]),
    count=st.integers(1, 9),
    split=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_digests_are_those_of_the_formula(page: int, count: int, split: int, seed: int) -> None:
    """A prompt inserted in two parts, into what is compiled and into what is interpreted."""
    pages = np.random.default_rng(seed).integers(-(2**40), 2**40, (count, page))
    for table in (
        PageTable(Geometry(page, 16), 16),
        PageTable(Geometry(page, 16), 16, loops=INTERPRETED),
    ):
        rows = table.add_rows(np.empty(0, dtype=np.int64), pages[: min(split, count)], None)
        rows = np.concatenate((rows, table.add_rows(rows, pages[len(rows) :], None)))
        root = table.root(None)
        assert root is not None
        weights = table._columns.weights.tolist()
        assert table.digest[rows].tolist() == digests(pages, weights, root)
        assert [table.row_of(int(digest)) for digest in table.digest[rows]] == rows.tolist()
        assert table.lookup(pages, None).tolist() == rows.tolist()


def test_order_of_pages_and_namespace_change_the_digest() -> None:
    table = PageTable(Geometry(16, 16), 16)
    pages = np.arange(32).reshape(2, 16)
    nothing = np.empty(0, dtype=np.int64)
    prompts = ((pages, 0), (pages[::-1].copy(), 0), (pages, 1))
    last = {int(table.digest[table.add_rows(nothing, *prompt)[-1]]) for prompt in prompts}
    assert len(last) == 3
