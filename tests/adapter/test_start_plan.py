"""What a server says at start about its memory."""

import dataclasses
import logging

import pytest

from sglang_ext.adapter.host_arena import only_ours_says_how_much
from sglang_ext.adapter.start_plan import HostPlan, StartPlan
from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import Recompute

GEOMETRY = Geometry(device_page=16, window=127)
FULL, WINDOW = (1000, 1000), (500, 500)
"""Bytes of a page, K and V."""
BUDGET = 10_000_000


def host_plan(always: int = 4096, with_room: int = 1024) -> HostPlan:
    shape = shape_for(BUDGET, (FULL, WINDOW), 1)
    recompute = Recompute(always, with_room)
    return HostPlan.of(shape, GEOMETRY, (BUDGET, "--hicache-size 0.01"), recompute)


def test_what_fits_follows_from_the_bytes() -> None:
    plan = host_plan()
    # up to what a last extent that is not whole would have held
    assert plan.tokens == pytest.approx(BUDGET / 2000 * 16, rel=0.01)
    assert plan.windows == pytest.approx(BUDGET / 1000 / 8, rel=0.01)
    assert plan.window_tokens == 128
    # 256 pages and one window of eight
    assert plan.spaced_tokens == pytest.approx(BUDGET / (256 * 2000 + 8 * 1000) * 4096, rel=0.06)
    assert plan.spaced_tokens < plan.tokens
    assert plan.bytes == BUDGET
    assert plan.describe(1).startswith("10.00 MB of host memory a rank (--hicache-size 0.01), one")


def test_without_windows_inside_and_without_full_attention() -> None:
    assert host_plan(0, 0).spaced_tokens == 0
    shape = shape_for(BUDGET, (WINDOW,), 1)
    alone = HostPlan.of(shape, GEOMETRY, (BUDGET, "x"), Recompute(1024, 1024))
    assert alone.tokens == 0
    assert alone.windows == pytest.approx(BUDGET / 1000 / 8, rel=0.01)
    assert "full attention or" not in alone.describe(1)


def test_the_line_has_every_decision() -> None:
    plan = StartPlan(
        host=dataclasses.replace(host_plan(), bytes=200 * 10**9),
        ranks=2,
        policies=("write_back", "slru"),
        copies="engine, --hicache-io-backend kernel",
        storage="file, pages of abc",
    )
    line = plan.line()
    for said in (
        "200.00 GB of host memory a rank (--hicache-size 0.01)",
        "400.00 GB on all 2 ranks",
        "tokens of full attention",
        "windows of 128 tokens",
        "a window every 4,096 tokens, every 1,024 while there is room",
        "write policy write_back, eviction slru",
        "copies: engine, --hicache-io-backend kernel",
        "storage: file, pages of abc",
    ):
        assert said in line
    assert "\n" not in line
    single = dataclasses.replace(plan, ranks=1, storage=None).line()
    assert "on all" not in single
    assert "storage: none" in single
    device = dataclasses.replace(plan, host=None).line()
    assert "on the device alone" in device
    assert "GB" not in device


def test_the_engine_does_not_say_it_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Its pools are views of one memory; other lines of theirs stay."""
    logger = logging.getLogger("a pool of the engine")
    with caplog.at_level(logging.INFO), only_ours_says_how_much(logger):
        logger.info("Allocating %s hierarchical KV host pool: %d tokens, %.2f GB", "full", 1, 2.0)
        logger.info("something else")
    logger.info("Allocating more")
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "something else"
    assert not logger.filters
