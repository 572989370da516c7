"""Catalogue 2H: a request never reads another prefix's KV."""

import numpy as np
import pytest

from sglang_ext.core.plan import TransferKind
from sglang_ext.testing.pools import prefix_tags
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
    serve_and_settle,
)


def test_every_loaded_row_holds_the_kv_of_its_own_position() -> None:
    """H1: several prefixes come back at once, into slots that others have used."""
    engine = engine_with(
        device_pages=32, device_window_pages=32, host_pages=32, host_window_pages=32
    )
    prompts = [join(prompt(2), prompt(4, seed)) for seed in range(1, 5)]
    serve_and_settle(engine, *prompts)
    engine.index.evict_device(ALL, ALL)
    requests = [engine.start(tokens) for tokens in reversed(prompts)]
    assert all(request.protected == 6 for request in requests)
    engine.settle()
    column = copies(engine)["swa_device"]
    for request in requests:
        rows = rows_of(engine, request.tokens)[-2:]
        tags = prefix_tags(request.tokens, None, engine.geometry)[4:6]
        assert column.ready[rows].all()
        assert engine.device.window.holds(column.slots[rows], tags[:, None])
        engine.compute(request, 1)
    check_all(engine)


def test_chunked_prefill_between_loads_reads_what_it_should() -> None:
    """H2: two conversations push each other to the host in the middle of their chunks."""
    engine = engine_with(device_pages=16, device_window_pages=10, host_pages=32)
    histories = [prompt(3, seed) for seed in (1, 2)]
    for turn in range(4):
        for number in (0, 1):
            request = engine.start(histories[number])
            engine.index.evict_device(ALL, ALL, abandon_backups=turn % 2 == 1)
            while not request.done:
                engine.compute(request, 24)
                engine.demote()
                for kind in TransferKind:
                    engine.copy(kind)
                    engine.commit(kind)
                check_all(engine)
            engine.finish(request)
            histories[number] = join(histories[number], prompt(2, seed=10 * turn + number + 3))
    engine.settle()
    assert engine.index.counters.loaded_pages > 0
    check_all(engine, idle=True)


@pytest.mark.parametrize("pressure", [False, True])
def test_a_backup_copies_the_window_as_it_was_when_it_began(pressure: bool) -> None:
    """H3: the request moves on and its window slides away before the copy is made."""
    engine = engine_with(device_pages=24, device_window_pages=24)
    tokens = prompt(10)
    request = engine.start(tokens)
    engine.compute(request, 4 * PAGE)
    backup = engine.index.pending[TransferKind.BACKUP][0]
    assert len(backup.window) == 2
    for _ in range(4):
        engine.compute(request, PAGE)
    if pressure:
        engine.index.evict_device(ALL, ALL)
        taken = engine.device.allocate_window(engine.device.free_window_pages())
        assert taken is not None
        engine.device.window.content[:, taken.ravel()] = 13  # another request's KV
        engine.device.window.release(taken)
    engine.copy(TransferKind.BACKUP)
    engine.commit(TransferKind.BACKUP)
    assert copies(engine)["swa_host"].ready[backup.window.rows].all()
    check_all(engine)
    engine.finish(request)
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    assert len(find(engine, tokens[: 4 * PAGE + 1]).rows) == 4


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_hit_at_any_boundary_reads_what_a_cold_request_would(cut: int) -> None:
    """H4: whatever the match, the window before the next token is whole."""
    engine = engine_with(device_pages=32, device_window_pages=32, checkpoint_pages=3)
    tokens = prompt(8)
    engine.finish(run(engine, tokens, chunk=3 * PAGE, settle=True))
    engine.index.evict_device(8 - cut // 2, 6)
    branch = np.concatenate((tokens[: cut * PAGE], prompt(2, seed=9)))
    request = engine.start(branch)
    assert request.protected <= cut
    while not request.done:
        engine.compute(request, 5)  # compares all it reads with the tags of a cold run
    engine.finish(request)
    check_all(engine, idle=True)
