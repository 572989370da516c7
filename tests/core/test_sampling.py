"""Copies ahead of eviction while nobody reads the host."""

import numpy as np
import pytest

from sglang_ext.core.host.sampling import ONE_IN, passed_over
from sglang_ext.core.plan import Transfer
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from tests.core.test_index import engine_with, prompt, serve
from tests.failures.scenarios import find

PAGES = 4
"""Of a prompt."""


def small(write: WritePolicy = WritePolicy.WRITE_BACK) -> SimEngine:
    """Room for 24 prompts on the device and six on the host."""
    return engine_with(
        device_pages=24 * PAGES,
        device_window_pages=24 * PAGES,
        host_pages=6 * PAGES,
        host_window_pages=6 * PAGES,
        write=write,
        low_share=4,
    )


def serve_once(engine: SimEngine, seeds: range) -> None:
    """Prompts that nobody asks for again."""
    for seed in seeds:
        serve(engine, prompt(PAGES, seed))
        engine.demote()
        engine.settle()


def copied(engine: SimEngine, seeds: range) -> int:
    """Pages that are copied to the host while such prompts come."""
    before = engine.index.counters.backed_up_pages
    engine.demote()
    engine.settle()
    serve_once(engine, seeds)
    return engine.index.counters.backed_up_pages - before


def on_host(engine: SimEngine, seeds: range) -> list[int]:
    """Those of ``seeds`` that the host alone has."""
    table = engine.index.table
    alone = table.host.ready & ~table.device.present
    return [seed for seed in seeds if alone[find(engine, prompt(PAGES, seed)).rows].any()]


def sampling(write: WritePolicy = WritePolicy.WRITE_BACK) -> SimEngine:
    """An engine that has lost all its host has without a read."""
    engine = small(write)
    serve_once(engine, range(60))
    assert engine.index.sampling.is_on
    return engine


@pytest.mark.parametrize("write", [WritePolicy.WRITE_BACK, WritePolicy.WRITE_THROUGH])
def test_all_is_copied_until_the_host_has_turned_over(write: WritePolicy) -> None:
    engine = small(write)
    index = engine.index
    seed = 0
    while not index.sampling.is_on:
        assert index.counters.evicted_host_pages < 6 * PAGES
        assert index.counters.dropped_pages == index.counters.evicted_host_pages
        serve_once(engine, range(seed, seed + 1))
        seed += 1
    assert index.counters.evicted_host_pages >= index.table.host.n_present > 4 * PAGES
    engine.check()


@pytest.mark.parametrize("write", [WritePolicy.WRITE_BACK, WritePolicy.WRITE_THROUGH])
def test_then_one_prefix_in_eight_is_copied_as_a_whole(write: WritePolicy) -> None:
    engine = sampling(write)
    prompts = 400
    pages = copied(engine, range(1000, 1000 + prompts))
    assert 0.7 < pages / PAGES / (prompts / ONE_IN) < 1.4
    assert engine.index.sampling.is_on
    for seed in on_host(engine, range(1000, 1000 + prompts)):
        assert len(find(engine, prompt(PAGES, seed)).rows) == PAGES
    engine.check_idle()


def test_a_read_brings_all_copies_back() -> None:
    engine = sampling()
    # nothing has to be looked at for a while
    engine.index.ahead.invalidate()
    engine.demote()
    free = engine.device.free_pages(), engine.device.free_window_pages()
    assert not engine.index.ahead.is_due(*free)
    serve(engine, prompt(PAGES, on_host(engine, range(60))[0]))
    assert not engine.index.sampling.is_on
    # what had been passed over is copied now, not when the next look is due
    assert copied(engine, range(0)) >= PAGES
    assert copied(engine, range(1000, 1004)) >= 4 * PAGES
    engine.check_idle()


def test_a_load_that_finds_no_room_is_a_read() -> None:
    engine = sampling()
    rows = find(engine, prompt(PAGES, on_host(engine, range(60))[0])).rows
    index = engine.index
    held = index.hold(np.flatnonzero(index.table.device.present))
    index.device_pool.allocate(index.device_pool.free_pages())
    assert not isinstance(index.begin_load(rows), Transfer)
    assert not index.sampling.is_on
    held.release()


def test_what_two_requests_used_is_always_copied() -> None:
    engine = sampling()
    seeds = range(1000, 1008)
    for seed in seeds:
        serve(engine, prompt(PAGES, seed))
        serve(engine, prompt(PAGES + 1, seed))
        engine.demote()
        engine.settle()
    assert copied(engine, range(2000, 2024)) >= len(seeds) * PAGES - 2 * PAGES
    assert engine.index.sampling.is_on


def test_nothing_is_passed_over_on_the_way_to_storage() -> None:
    engine = sampling()
    engine.index.attachment.limits = object()
    assert not engine.index.sampling.is_on


def test_the_sample_is_one_in_eight_however_many_ticks_a_request_takes() -> None:
    engine = small()
    table = engine.index.table
    serve(engine, prompt(1))
    row = int(np.flatnonzero(table.device.present)[0])
    for stride in range(1, 40):
        over = []
        for request in range(400):
            table.tick = 7 + stride * request
            table.use(np.array([row]))
            over.append(bool(passed_over(table, np.array([row]))[0]))
        assert abs(over.count(False) - 400 / ONE_IN) <= 15, stride
