"""Scenarios of the index that deserve a name."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sglang_ext.core import invariants
from sglang_ext.core.plan import Declined, DeclineReason, Hold, TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import SimRequest
from sglang_ext.testing.sizes import Sizes

PAGE = 16


def prompt(pages: int, seed: int = 0) -> NDArray[np.int64]:
    """Whole pages and one token, which a match must leave to compute."""
    return np.random.default_rng(seed).integers(0, 1000, pages * PAGE + 1)


def serve(engine: SimEngine, tokens: NDArray[np.int64], namespace: object = None) -> None:
    """A request from start to finish."""
    request = engine.start(tokens, namespace)
    engine.compute(request, len(tokens))
    engine.finish(request)


def engine_with(engine_type: type[SimEngine] = SimEngine, **sizes: Any) -> SimEngine:
    """16-token pages, a window of two pages; nothing is copied before its time."""
    defaults = {
        "device_pages": 12,
        "device_window_pages": 12,
        "host_pages": 24,
        "host_window_pages": 12,
    }
    return engine_type(Geometry(PAGE, 32), Sizes(**{"low_share": 1000, **defaults, **sizes}))


def started(engine: SimEngine, tokens: NDArray[np.int64]) -> SimRequest:
    """A request that runs."""
    return engine.start(tokens)


def test_a_conversation_resumes_from_the_host_after_device_eviction() -> None:
    engine = engine_with()
    tokens = prompt(6)
    serve(engine, tokens)
    engine.settle()
    engine.index.evict_device(6, 6)
    request = started(engine, tokens)
    assert request.protected == 6
    engine.compute(request, 1)  # reads its prefix: the contents are checked
    engine.finish(request)
    engine.settle()
    assert engine.index.counters.loaded_pages == 6
    # only the window comes back, not the sliding-window KV of the whole prefix
    assert engine.index.counters.loaded_window_pages == 2


def test_device_eviction_alone_keeps_less_when_backups_are_not_committed() -> None:
    engine = engine_with()
    serve(engine, prompt(6))
    # the pages are pinned by the backup in flight: nothing can be taken
    assert engine.index.evict_device(6, 6)[0] == 0
    engine.settle()
    assert engine.index.evict_device(6, 6)[0] == 6


def test_a_load_without_device_room_is_declined_and_changes_nothing() -> None:
    engine = engine_with(device_pages=8, device_window_pages=8)
    tokens = prompt(5)
    serve(engine, tokens)
    engine.settle()
    engine.index.evict_device(5, 5)
    blocker = started(engine, prompt(6, seed=1))
    engine.compute(blocker, len(blocker.tokens))
    engine.settle()
    match = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    plan = engine.index.begin_load(match.rows)
    assert plan == Declined(DeclineReason.DEVICE_FULL)
    engine.check()
    request = started(engine, tokens)
    assert request.protected == 0


def test_a_stale_match_is_declined() -> None:
    engine = engine_with()
    tokens = prompt(5)
    serve(engine, tokens)
    engine.settle()
    engine.index.evict_device(5, 5)
    match = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    engine.press_host(windows=12)
    assert engine.index.begin_load(match.rows) == Declined(DeclineReason.STALE)
    engine.check()


def test_a_host_page_is_not_released_before_its_backup_is_acknowledged() -> None:
    engine = engine_with(host_pages=6, host_window_pages=4)
    serve(engine, prompt(6))
    assert engine.index.pending[TransferKind.BACKUP]
    engine.press_host(pages=6, windows=4)
    assert engine.host.free_pages() == 0, "a RESERVED host page was given away"
    engine.settle()
    engine.press_host(pages=6)
    assert engine.host.free_pages() == 6


def test_a_host_page_is_not_released_while_it_is_loaded_from() -> None:
    engine = engine_with()
    tokens = prompt(6)
    serve(engine, tokens)
    engine.settle()
    engine.index.evict_device(6, 6)
    started(engine, tokens)
    engine.press_host(pages=24, windows=12)
    assert engine.host.used >= 6
    # a window that shares a page with the one that is loaded stays, too
    assert engine.host_window.used == 3


def test_locked_pages_survive_eviction_and_a_window_lock_covers_only_the_window() -> None:
    engine = engine_with(host_pages=0)
    tokens = prompt(6)
    serve(engine, tokens)
    match = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    hold = engine.index.hold(match.rows)
    assert engine.index.evict_device(6, 6)[0] == 0
    assert engine.index.table.swa_device.n_present == 2
    again = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    assert again.device_pages == 6
    hold.release()
    with pytest.raises(AssertionError, match="released twice"):
        hold.release()


def test_a_missing_window_clamps_the_match_and_is_revived_by_the_next_request() -> None:
    engine = engine_with(host_pages=0)
    tokens = prompt(6)
    serve(engine, tokens)
    engine.index.evict_device(0, 6)
    match = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    assert match.device_pages == 0
    serve(engine, tokens)  # computes again, and gives the table its window back
    engine.check()
    match = engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    assert match.device_pages == 6


def test_namespaces_do_not_share_pages_and_leave_nothing_behind() -> None:
    engine = engine_with(host_pages=0)
    tokens = prompt(3)
    request = engine.start(tokens, "salt")
    engine.compute(request, len(tokens))
    engine.finish(request)
    pages = tokens[:-1].reshape(-1, PAGE)
    assert engine.index.match(pages, None).device_pages == 0
    assert engine.index.match(pages, "salt").device_pages == 3
    engine.index.evict_device(3, 3)
    assert not engine.index.table._roots
    invariants.check(engine.index)


def test_a_digest_collision_costs_a_miss_and_nothing_else() -> None:
    engine = engine_with(host_pages=0)
    # every page has the same digest at a given depth: only token comparison tells
    engine.index.table._columns.weights[:] = 0
    serve(engine, prompt(3, seed=1))
    serve(engine, prompt(3, seed=2))
    engine.check()
    assert engine.index.counters.collisions > 0
    assert engine.index.match(prompt(3, seed=1)[:-1].reshape(-1, PAGE), None).device_pages == 3
    assert engine.index.match(prompt(3, seed=2)[:-1].reshape(-1, PAGE), None).device_pages == 0


def test_match_is_read_only() -> None:
    engine = engine_with()
    tokens = prompt(6)
    serve(engine, tokens)
    table = engine.index.table
    before = (table.tick, table.age.copy(), table.swa_age.copy(), table.n_rows)
    engine.index.match(tokens[:-1].reshape(-1, PAGE), None)
    assert before[0] == table.tick and before[3] == table.n_rows
    assert (before[1] == table.age).all() and (before[2] == table.swa_age).all()


def test_a_failed_backup_leaves_no_ready_page_and_frees_its_slots() -> None:
    engine = engine_with()
    serve(engine, prompt(4))
    engine.copy(TransferKind.BACKUP)
    engine.commit(TransferKind.BACKUP, ok=False)
    engine.settle()
    assert engine.index.counters.failed_transfers == 1
    assert engine.host.used == engine.index.table.host.n_present
    engine.check_idle()


def test_load_and_backup_of_one_page_may_be_in_flight_together() -> None:
    engine = engine_with()
    tokens = prompt(6)
    serve(engine, tokens)
    engine.settle()
    engine.index.evict_device(6, 6)
    longer = np.concatenate((tokens[:-1], prompt(2, seed=3)))
    request = started(engine, longer)
    engine.compute(request, len(longer))
    assert isinstance(request.lock, Hold)
    engine.finish(request)
    for kind in (TransferKind.BACKUP, TransferKind.LOAD):
        assert engine.index.pending[kind]
    engine.settle()
    engine.check_idle()


def test_the_window_where_prefixes_diverge_is_kept() -> None:
    """A system prompt outlives the conversations on it, with its window."""
    engine = engine_with(device_pages=32, device_window_pages=32, checkpoint_pages=99)
    engine._slide = lambda request: None  # type: ignore[method-assign]  # as in a real prefill
    system = prompt(3)[:-1]
    first, second = (np.concatenate((system, prompt(5, seed))) for seed in (1, 2))
    for tokens in (first, second):
        serve(engine, tokens)
        engine.settle()
    engine.index.evict_device(99, 99)
    third = np.concatenate((system, prompt(2, seed=3)))
    request = started(engine, third)
    assert request.protected == 3
    engine.compute(request, len(third))  # the contents are checked


def test_what_leaves_the_device_without_a_copy_is_counted_once() -> None:
    engine = engine_with()
    kept, lost = prompt(4, 1), prompt(5, 2)
    serve(engine, kept)
    engine.settle()
    engine.index.evict_device(4, 4)
    assert engine.index.counters.unsaved_pages == 0, "they are on the host"
    serve(engine, lost)
    engine.index.evict_device(5, 5, abandon_backups=True)
    assert engine.index.counters.unsaved_pages == 5
    alone = engine_with(host_pages=0, host_window_pages=0)
    serve(alone, lost)
    alone.index.evict_device(5, 5)
    assert alone.index.counters.unsaved_pages == 0, "there is no host that lost them"
