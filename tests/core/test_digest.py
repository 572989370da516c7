"""Page digests: vectorized and incremental forms agree."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.core.table.digest import PageHasher


@given(
    page=st.sampled_from([16, 64]),
    count=st.integers(1, 9),
    split=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_digests_of_a_prompt_are_those_of_its_pages_one_by_one(
    page: int, count: int, split: int, seed: int
) -> None:
    hasher = PageHasher(page)
    pages = np.random.default_rng(seed).integers(-(2**40), 2**40, (count, page))
    digest, expected = hasher.seed(3), []
    for depth, tokens in enumerate(pages):
        digest = hasher.one(digest, tokens, depth)
        expected.append(digest)
    split = min(split, count)
    head = hasher.many(hasher.seed(3), pages[:split], 0).tolist()
    base = head[-1] if head else hasher.seed(3)
    assert head + hasher.many(base, pages[split:], split).tolist() == expected


def test_order_of_pages_and_namespace_change_the_digest() -> None:
    hasher = PageHasher(16)
    pages = np.arange(32).reshape(2, 16)
    forward = hasher.many(hasher.seed(0), pages, 0)[-1]
    assert forward != hasher.many(hasher.seed(0), pages[::-1], 0)[-1]
    assert forward != hasher.many(hasher.seed(1), pages, 0)[-1]
