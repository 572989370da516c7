"""Backups under pressure: what is given up, what is not, and when copies start."""

from typing import Any

import numpy as np

from sglang_ext.core.plan import TransferKind
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from tests.core.test_index import engine_with, prompt, serve, started


def write_back(device_pages: int, host_pages: int, **sizes: Any) -> SimEngine:
    """As many window pages as pages, and nothing is declined for what it pins."""
    return engine_with(
        device_pages=device_pages,
        device_window_pages=device_pages,
        host_pages=host_pages,
        host_window_pages=host_pages,
        write=WritePolicy.WRITE_BACK,
        **{"pinned_share": 1, "low_share": 4, **sizes},
    )


def fill_host(engine: SimEngine, prompts: int) -> None:
    for seed in range(prompts):
        serve(engine, prompt(4, seed))
        engine.demote()
        engine.settle()


def test_abandoned_backups_do_not_empty_the_host() -> None:
    """Copies that never end take no more of the host than pending ones may."""
    engine = write_back(40, 100, pinned_share=2, low_share=1)
    fill_host(engine, 40)
    before = engine.index.table.host.n_present
    for seed in range(100, 140):
        serve(engine, prompt(4, seed))
        engine.demote()
        free = engine.device.free_pages()
        engine.index.evict_device(40 - free, 0, abandon_backups=True)
    assert engine.index.host.detached <= 20
    assert engine.index.table.host.n_present >= before - 40
    engine.settle()
    engine.check_idle()


def test_a_backup_that_frees_nothing_is_not_abandoned() -> None:
    """The request that it backs up holds the same pages."""
    engine = engine_with(pinned_share=1)
    request = started(engine, prompt(8))
    engine.compute(request, 4 * 16)
    assert engine.index.pending[TransferKind.BACKUP]
    assert engine.index.evict_device(99, 0, abandon_backups=True) == (0, 0)
    assert engine.index.counters.abandoned_transfers == 0
    engine.abort(request)
    assert engine.index.evict_device(99, 0, abandon_backups=True)[0] == 4
    engine.settle()
    engine.check_idle()


def test_copies_start_while_requests_decode() -> None:
    """Decoding allocates pages that the table does not see before the request ends."""
    engine = write_back(40, 100)
    for seed in range(5):
        serve(engine, prompt(4, seed))
    engine.demote()
    assert not engine.index.pending[TransferKind.BACKUP]
    request = started(engine, prompt(20, seed=9))
    for _ in range(20):
        engine.compute(request, 16, checkpoint=False)
        engine.demote()
        engine.settle()
    assert engine.index.counters.backed_up_pages >= 8
    assert engine.index.counters.dropped_pages == 0
    engine.finish(request)
    engine.settle()
    engine.check_idle()


def test_the_oldest_pages_are_copied_however_many_younger_ones_have_a_copy() -> None:
    """Eviction goes by age: clean pages elsewhere do not save the dirty ones before them."""
    engine = write_back(41, 40)
    for seed in range(10):
        serve(engine, prompt(4, seed))
    table = engine.index.table
    for seed in range(2, 10):  # all but the two oldest prompts
        rows = table.lookup(prompt(4, seed)[:-1].reshape(-1, 16), None)
        engine.submit(engine.index.backups.begin(rows, make_room=True))
        engine.settle()
    engine.demote()
    engine.settle()
    engine.index.evict_device(8, 8)
    assert engine.index.counters.dropped_pages == 0


def test_a_window_is_copied_whole_if_another_one_shares_its_last_page() -> None:
    """Two prompts diverge where the host has only the last page of the window before it."""
    # pages alone are looked for, so a window is found by its pages
    engine = write_back(12, 24, low_share=1, low_window_pages=0, checkpoint_pages=0)
    index = engine.index
    shared = prompt(4)[:-1]
    first, second, third = (np.concatenate((shared, prompt(1, seed))) for seed in (1, 2, 3))
    serve(engine, first)
    engine.demote()
    engine.settle()
    serve(engine, second)
    index.evict_device(2, 0)  # what follows the shared pages
    engine.demote()
    engine.settle()
    index.evict_device(12, 0)
    request = started(engine, third)
    assert request.protected == 4
    engine.abort(request)
    engine.settle()
    engine.check_idle()
