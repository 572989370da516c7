"""What the cache offers can be admitted: compared with the engine's own budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.adapter.admission import Admission


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
)
def test_it_is_the_rule_of_the_engine(
    page: int,
    window: int,
    pool: int,
    chunk: int | None,
    extend: int,
    locked_pages: int,
    pinned_pages: int,
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
        max_new_tokens=10**6,  # an answer of any length
        input_tokens=extend,
        swa_host_hit_length=pinned,
        chunk_limit=chunk,
    )
    assert admission.is_possible(extend, locked, pinned) == admitted


def test_a_request_that_would_wait_for_ever() -> None:
    """12 pages of 64, a window of two locked and two to load: found by the soak."""
    admission = Admission(pool=819, window=127, page=64, chunk=512)
    assert not admission.is_possible(extend=600, locked=128, pinned=128)
    assert admission.is_possible(extend=600, locked=128, pinned=0)
