"""Catalogue 2D: what is copied to the host, and what is dropped."""

import pytest

from sglang_ext.core.plan import TransferKind
from sglang_ext.core.write_policy import WritePolicy
from tests.failures.scenarios import (
    ALL,
    PAGE,
    check_all,
    copies,
    engine_with,
    find,
    join,
    prompt,
    rows_of,
    run,
    serve,
    serve_and_settle,
)


def test_a_host_allocation_that_fails_is_a_dropped_page_not_a_copy() -> None:
    """D1."""
    engine = engine_with(write=WritePolicy.WRITE_BACK, low_share=1)
    tokens = prompt(4)
    engine.host.allocations_to_fail = 1
    serve(engine, tokens)
    engine.demote()
    engine.settle()
    counters = engine.index.counters
    assert (counters.failed_transfers, counters.backed_up_pages) == (1, 0)
    assert not copies(engine)["host"].present.any() and engine.host.used == 0
    assert engine.index.evict_device(ALL, ALL)[0] == 4
    assert (counters.dropped_pages, counters.demoted_pages) == (4, 0)
    assert len(find(engine, tokens).rows) == 0
    check_all(engine, idle=True)


def test_selective_copies_when_a_second_request_comes_not_a_second_chunk() -> None:
    """D2."""
    engine = engine_with(write=WritePolicy.WRITE_THROUGH_SELECTIVE, device_pages=24)
    shared = prompt(6)
    engine.finish(run(engine, shared, chunk=2 * PAGE, settle=True))
    assert engine.index.last_op(TransferKind.BACKUP) == -1
    engine.finish(run(engine, join(shared, prompt(2, seed=1)), settle=True))
    assert engine.index.last_op(TransferKind.BACKUP) == 0
    on_host = copies(engine)["host"].ready[rows_of(engine, join(shared, prompt(2, seed=1)))]
    assert on_host.tolist() == [True] * 6 + [False] * 2
    check_all(engine, idle=True)


@pytest.mark.parametrize("write", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_a_host_smaller_than_the_device_still_takes_what_is_new(write: WritePolicy) -> None:
    """D3: copies of two hot conversations fill it, and give way."""
    sizes = {"device_pages": 16, "device_window_pages": 16, "host_pages": 8}
    engine = engine_with(write=write, low_share=1, **sizes)
    for seed in range(2, 5):
        for hot in (0, 1):
            engine.finish(run(engine, prompt(4, hot), settle=True))
        engine.finish(run(engine, prompt(4, seed), settle=True))
        check_all(engine)
    assert engine.index.counters.reclaimed_duplicate_pages > 0
    engine.index.evict_device(ALL, ALL)
    assert len(find(engine, prompt(4, seed=3)).rows) == 4, "the host took in nothing new"
    check_all(engine, idle=True)


def test_every_chunk_of_a_long_prompt_is_copied() -> None:
    """D4."""
    engine = engine_with()
    tokens = prompt(6)
    request = engine.start(tokens)
    for chunk in range(1, 4):
        engine.compute(request, 2 * PAGE)
        engine.settle()
        assert int(copies(engine)["host"].ready.sum()) == 2 * chunk
    engine.abort(request)
    engine.index.evict_device(ALL, ALL)
    assert len(find(engine, tokens).rows) == 6


@pytest.mark.parametrize("change", ["branch", "lost window", "taken back", "flush"])
def test_an_acknowledgement_finds_its_pages_whatever_happened(change: str) -> None:
    """D5."""
    engine = engine_with(device_pages=24, device_window_pages=24)
    tokens = prompt(6)
    serve(engine, tokens)
    assert engine.index.pending[TransferKind.BACKUP]
    if change == "branch":
        serve(engine, join(tokens[: 3 * PAGE + 1], prompt(2, seed=1)))
    elif change == "lost window":
        engine.index.evict_device(0, ALL)
    elif change == "taken back":
        engine.index.evict_device(ALL, ALL, abandon_backups=True)
    else:
        engine.reset()
        serve(engine, tokens)
    check_all(engine)
    while engine.index.pending[TransferKind.BACKUP]:
        engine.copy(TransferKind.BACKUP)
        engine.commit(TransferKind.BACKUP)
        check_all(engine)
    wanted = 0 if change == "taken back" else 6
    on_host = copies(engine)["host"].ready[rows_of(engine, tokens)]
    assert int(on_host.sum()) == wanted
    check_all(engine, idle=True)


def test_every_dropped_page_is_counted_once() -> None:
    """D6: what had a copy counts as moved, what had none as dropped."""
    engine = engine_with(device_pages=24, device_window_pages=24)
    kept, lost = prompt(4, seed=1), prompt(3, seed=2)
    serve_and_settle(engine, kept)
    tier, engine.index.host_tier = engine.index.host_tier, None
    serve(engine, lost)
    engine.index.host_tier = tier
    windows = copies(engine)["swa_device"].n_present
    saved = int((copies(engine)["swa_device"].present & copies(engine)["swa_host"].present).sum())
    assert engine.index.evict_device(ALL, ALL)[0] == 7
    numbers = engine.index.counters.as_dict()
    assert (numbers["demoted_pages"], numbers["dropped_pages"]) == (4, 3)
    assert numbers["dropped_window_pages"] == windows - saved > 0
