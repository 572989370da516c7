"""A storage that has pages of other weights than the table: it is left alone."""

import numpy as np

from sglang_ext.core.storage.keys import namespace_seed
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.storage import SimStore
from tests.core.storage_ranks import PAGE, match, rank, serve, step, tokens


def steps(engine: SimEngine, count: int = 6) -> None:
    for _ in range(count):
        step(engine)


def test_nothing_is_written_and_nothing_is_looked_for() -> None:
    store = SimStore()
    serve(rank(store), tokens(10))
    stored = set(store.pages)
    engine = rank(store)
    engine.index.suspend_storage()
    serve(engine, tokens(10))
    serve(engine, tokens(10, seed=1))
    assert set(store.pages) == stored
    assert engine.index.counters.prefetched_pages == 0
    assert not engine.index.persists.has_more, "a flush would wait for ever"
    engine.check_idle()


def test_what_is_read_when_it_is_suspended_is_not_used() -> None:
    store = SimStore()
    serve(rank(store), tokens(10))
    for after in range(6):
        engine = rank(store)
        engine.arrive(tokens(10))
        steps(engine, after)
        found = match(engine, tokens(10))
        engine.index.suspend_storage()
        steps(engine)
        assert match(engine, tokens(10)) == found
        assert not engine.index.prefetches.lookups
        assert not engine.index.prefetches.reading
        engine.check()


def test_what_is_being_written_when_it_is_suspended_ends_under_its_name() -> None:
    store, alone = SimStore(), SimStore()
    serve(rank(alone), tokens(10))
    engine = rank(store, storage_threshold=1)
    engine.arrive(tokens(10))
    steps(engine)
    request = engine.admit(0)
    while not request.done:
        engine.compute(request, 5 * PAGE)
    engine.finish(request)
    for _ in range(20):
        if engine.index.persists.writing:
            break
        step(engine)
    assert engine.index.persists.writing
    engine.index.suspend_storage()
    steps(engine, 12)
    assert not engine.index.persists.writing
    assert store.pages
    assert set(store.pages) <= set(alone.pages)
    engine.check()


def test_when_it_is_attached_again_the_host_is_written() -> None:
    store, alone = SimStore(), SimStore()
    serve(rank(alone), tokens(10))
    engine = rank(store)
    limits = engine.index.attachment.limits
    assert limits is not None
    engine.index.suspend_storage()
    serve(engine, tokens(10))
    assert not store.pages
    engine.index.attach_storage(limits)
    steps(engine)
    assert set(store.pages) == set(alone.pages)
    engine.check_idle()


def test_at_shutdown_nothing_of_other_weights_is_saved() -> None:
    engine = rank(SimStore())
    engine.index.suspend_storage()
    serve(engine, tokens(10))
    assert engine.index.backups.save_more(set()) == []


def test_a_namespace_goes_by_the_name_that_it_is_given() -> None:
    """As an adapter that is loaded again under another number: what one wrote the other finds."""
    store = SimStore()
    adapter = namespace_seed(("the same adapter", None))

    def names(own: str) -> SimEngine:
        engine = rank(store)
        engine.index.name_namespaces(lambda n: adapter if n == own else namespace_seed((n, None)))
        return engine

    serve(names("number 1"), tokens(10), "number 1")
    second = names("number 2")
    second.arrive(tokens(10), "number 2")
    steps(second)
    pages = np.ascontiguousarray(tokens(10)[: 10 * PAGE].reshape(-1, PAGE))
    assert len(second.index.match(pages, "number 2").rows) > 0
    third = names("number 3")
    third.arrive(tokens(10), "number 2")
    steps(third)
    assert len(third.index.match(pages, "number 2").rows) == 0
