"""What one eviction frees beyond what was asked for, and what it must not."""

from sglang_ext.core.device.victims import Spare
from sglang_ext.core.write_policy import WritePolicy
from tests.failures.scenarios import (
    check_all,
    engine_with,
    find,
    join,
    prompt,
    rows_of,
    serve_and_settle,
)

SPARE = Spare(3, 3)


def test_without_a_host_tier_the_spare_goes_along() -> None:
    engine = engine_with(device_pages=20, device_window_pages=20, host_pages=0, spare=SPARE)
    serve_and_settle(engine, prompt(4, 1), prompt(4, 2), prompt(4, 3))
    assert engine.index.evict_device(0, 1) == (0, 4)
    assert engine.index.evict_device(1, 0)[0] == 4
    check_all(engine, idle=True)


def test_less_is_spare_where_what_goes_is_lost() -> None:
    lost, copied = (Spare.for_device(6400, 3200, has_host=has_host) for has_host in (False, True))
    assert (lost.beside(100), lost.beside_windows(100)) == (100, 50)
    assert (copied.beside(100), copied.beside_windows(100)) == (200, 100)
    assert lost.beside(1) == 63, "an eviction of a single page frees what many more will need"


def test_a_page_without_a_copy_is_never_spare() -> None:
    """It could still be copied; a policy that writes back has not done so yet."""
    engine = engine_with(
        device_pages=20, device_window_pages=20, write=WritePolicy.WRITE_BACK, spare=SPARE
    )
    serve_and_settle(engine, prompt(12))
    assert engine.index.table.host.n_present == 0
    assert engine.index.evict_device(1, 0) == (1, 1)
    left = engine.index.table.swa_device.n_present
    assert left > 1
    assert engine.index.evict_device(0, 1) == (0, 1)
    check_all(engine, idle=True)


def test_spare_pages_with_copies_are_still_found() -> None:
    engine = engine_with(device_pages=20, device_window_pages=20, spare=SPARE)
    serve_and_settle(engine, prompt(12))
    known = engine.index.table.n_rows
    assert engine.index.evict_device(1, 0)[0] == 4
    assert engine.index.table.n_rows == known
    check_all(engine, idle=True)


def test_a_page_that_is_matched_and_not_admitted_keeps_its_rank() -> None:
    """One that was used once goes before one that was used twice, whenever that was."""
    engine = engine_with(device_pages=20, device_window_pages=20, host_pages=0, eviction="slru")
    first, once, twice = prompt(4, 1), prompt(4, 2), prompt(4, 3)
    serve_and_settle(engine, first, once, twice, join(twice, prompt(1, 4)))
    index = engine.index
    index.evict_device(1, 0)  # now the queue knows all of them
    index.residency.use(find(engine, once).rows)
    assert index.evict_device(8, 0)[0] == 8
    assert len(rows_of(engine, once)) == 0
    assert len(rows_of(engine, twice)) == 4
