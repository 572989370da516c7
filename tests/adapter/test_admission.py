"""What the cache offers can be admitted: compared with the engine's own budget."""

import array
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.plan import PrefixMatch
from tests.core.test_index import PAGE, engine_with, prompt, serve


class Pool:
    """Allocator and tree cache of an engine in which nothing else runs."""

    def __init__(self, admission: Admission, locked: int) -> None:
        self.size_swa = admission.pool
        self.page_size = admission.page
        self.sliding_window_size = admission.window
        self._left = admission.pool // admission.page * admission.page - locked

    def full_available_size(self) -> int:
        return 1 << 30

    def swa_available_size(self) -> int:
        return self._left

    def full_evictable_size(self) -> int:
        return 0

    swa_evictable_size = full_evictable_size


@settings(max_examples=500, deadline=None)
@given(
    page=st.sampled_from([1, 16, 64]),
    window=st.integers(1, 300),
    pool=st.integers(64, 2500),
    chunk=st.sampled_from([None, 128, 512]),
    extend=st.integers(1, 1500),
    locked_pages=st.integers(0, 10),
    pinned_pages=st.integers(0, 10),
    max_new=st.sampled_from([0, 8, 40, 10**4]),
)
def test_it_is_the_rule_of_the_engine(
    page: int,
    window: int,
    pool: int,
    chunk: int | None,
    extend: int,
    locked_pages: int,
    pinned_pages: int,
    max_new: int,
) -> None:
    from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget

    admission = Admission(pool, window, page, chunk)
    locked, pinned = locked_pages * page, pinned_pages * page
    budget = SWAPrefillBudget.__new__(SWAPrefillBudget)
    budget.tree_cache = budget.allocator = Pool(admission, locked)
    budget.page_size, budget.all_swa, budget.req_ring = page, False, False
    budget.total_offset = budget.current_offset = budget.swa_offset = 0
    admitted, _ = budget.check_prefill(
        extend_input_len=extend,
        total_tokens=extend,
        max_new_tokens=max_new,
        input_tokens=extend,
        swa_host_hit_length=pinned,
        chunk_limit=chunk,
    )
    assert admission.is_possible(extend, max_new, locked, pinned) == admitted


@settings(max_examples=500, deadline=None)
@given(
    page=st.sampled_from([1, 16, 64]),
    window=st.integers(1, 300),
    pool=st.integers(64, 4000),
    chunk=st.sampled_from([None, 128, 512]),
    kept=st.integers(0, 400),
    below=st.integers(0, 300),
    max_new=st.sampled_from([0, 8, 40, 10**4]),
    data=st.data(),
)
def test_what_is_sure_is_possible(
    page: int,
    window: int,
    pool: int,
    chunk: int | None,
    kept: int,
    below: int,
    max_new: int,
    data: st.DataObject,
) -> None:
    admission = Admission(pool, window, page, chunk)
    length = min(admission.surely_up_to(kept), 2 * pool) - below
    locked, pinned = data.draw(st.integers(0, kept)), data.draw(st.integers(0, kept))
    if length > 0:
        assert admission.is_possible(length, max_new, locked, pinned)


def test_a_request_that_would_wait_for_ever() -> None:
    """12 pages of 64, a window of two locked and two to load: found by the soak."""
    admission = Admission(pool=819, window=127, page=64, chunk=512)
    assert not admission.is_possible(extend=600, max_new=40, locked=128, pinned=128)
    assert admission.is_possible(extend=600, max_new=40, locked=128, pinned=0)


def test_a_short_request_on_a_pool_of_two_windows() -> None:
    """The engine asks for what is generated, not for a whole window."""
    admission = Admission(pool=272, window=128, page=16, chunk=8192)
    assert admission.is_possible(extend=17, max_new=32, locked=128, pinned=0)


def test_a_limited_key_is_not_a_shorter_prefill() -> None:
    """The engine limits the key so that a token is left to compute; it prefills them all."""
    asked: list[int] = []

    class Recorder:
        def surely_up_to(self, kept: int) -> int:
            return 0

        def possible_part(self, match: PrefixMatch, locked: int, length: int, *_: int) -> Any:
            asked.append(length - len(match.rows) * PAGE)
            return match

    engine = engine_with()
    serve(engine, prompt(6), namespace=(None, None))
    params: Any = SimpleNamespace(
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        page_size=1,
        draft_swa_window=0,
    )
    cache: Any = SwaHiCache(params, engine.index, engine.device, Recorder())
    tokens = array.array("q", prompt(6).tolist())
    key: Any = RadixKey(tokens, limit=len(tokens) - 1)
    cache.match_prefix(MatchPrefixParams(key=key))
    assert asked == [1]  # 96 tokens are there, and the key says 96
