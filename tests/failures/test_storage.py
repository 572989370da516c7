"""How tiers below the host have failed elsewhere."""

import pytest

from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.storage import SimStore
from tests.core.storage_ranks import PAGE, match, rank, serve, step, tokens


def test_an_exact_repeat_of_whole_pages_is_found_in_storage() -> None:
    """One token must be left to compute, so the last page is; not more."""
    store = SimStore()
    serve(rank(store), tokens(10, extra=0))
    fresh = rank(store)
    fresh.arrive(tokens(10, extra=0))
    for _ in range(6):
        step(fresh)
    request = fresh.admit(0)
    assert request.computed >= 8 * PAGE, "a window before the last page is kept by the chunks"


def test_a_hit_whose_window_is_gone_resumes_from_the_last_checkpoint() -> None:
    """The full-attention pages are all there; so is an older window."""
    store = SimStore()
    engine = rank(store, checkpoint_pages=4)
    serve(engine, tokens(12))
    windows = [key for key in store.pages if key[0] == 1]
    path = engine.index.table.lookup(tokens(12)[: 12 * PAGE].reshape(-1, PAGE), None)
    last = {(1, key) for key in engine.index.table.storage_keys(path)[-2:]}
    assert last <= set(windows)
    for key in last:
        del store.pages[key]
    fresh = rank(store, checkpoint_pages=4)
    fresh.arrive(tokens(12))
    for _ in range(6):
        step(fresh)
    assert match(fresh, tokens(12)) == 10, "not the window before: chunks are of five pages"
    fresh.check_every_slot()


def test_full_pages_without_any_window_are_not_used() -> None:
    """Nothing can be resumed from them."""
    store = SimStore()
    serve(rank(store), tokens(10))
    for key in [key for key in store.pages if key[0] == 1]:
        del store.pages[key]
    fresh = rank(store)
    fresh.arrive(tokens(10))
    for _ in range(6):
        step(fresh)
    assert match(fresh, tokens(10)) == 0
    assert fresh.index.counters.prefetched_pages == 0
    fresh.check_idle()


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_a_prefix_in_storage_has_no_hole(policy: WritePolicy) -> None:
    """Also when the end of a conversation leaves the device long before its beginning."""
    store = SimStore()
    engine = rank(store, write=policy, low_share=1)
    for turn in (4, 8, 12):
        serve(engine, tokens(turn))
        engine.demote()
        engine.settle()
        step(engine)
    for _ in range(6):
        step(engine)
    assert len(store.pages) > 0
    path = engine.index.table.lookup(tokens(12)[: 12 * PAGE].reshape(-1, PAGE), None)
    keys = engine.index.table.storage_keys(path)
    has = [(0, key) in store.pages for key in keys]
    assert has == sorted(has, reverse=True), "a page is missing in front of another one"
    assert has[7], "the first turns are not in storage"
