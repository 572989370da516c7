"""What fits in the host memory of a rank."""

import pytest

from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import Recompute
from sglang_ext.planning.host_plan import HostPlan

GEOMETRY = Geometry(device_page=16, window=127)
FULL, WINDOW = (1000, 1000), (500, 500)
"""Bytes of a page, K and V."""
BUDGET = 10_240_000


def host_plan(always: int = 4096, with_room: int = 1024) -> HostPlan:
    shape = shape_for(BUDGET, (FULL, WINDOW), 1)
    return HostPlan.of(shape, GEOMETRY, "--hicache-size 0.01", Recompute(always, with_room))


def said(plan: HostPlan, ranks: int = 1) -> str:
    return "\n".join(f"{name}: {text}" for name, text in plan.rows(ranks))


def test_what_fits_follows_from_the_bytes() -> None:
    plan = host_plan()
    # up to what a last extent that is not whole would have held
    assert plan.tokens == pytest.approx(BUDGET / 2000 * 16, rel=0.01)
    assert plan.windows == pytest.approx(BUDGET / 1000 / 8, rel=0.01)
    assert (plan.window_pages, plan.window_tokens) == (8, 128)
    assert (plan.token_bytes, plan.window_bytes) == (125, 8000)
    # 256 pages and one window of eight
    assert plan.spaced_tokens == pytest.approx(BUDGET / (256 * 2000 + 8 * 1000) * 4096, rel=0.06)
    assert plan.spaced_tokens < plan.tokens
    assert plan.bytes == BUDGET


def test_a_reader_is_told_all_of_it() -> None:
    text = said(host_plan(), ranks=2)
    for part in (
        "host memory: 10.24 MB a rank (--hicache-size 0.01), 20.48 MB on all 2 ranks",
        "125 bytes a token of full attention, 8.00 kB a window of 128 tokens in 8 pages",
        "81,920 tokens of full attention or 1,280 windows or",
        "tokens with a window every 4,096",
        "a window every 4,096 tokens (K), every 1,024 while there is room",
    ):
        assert part in text
    assert "on all" not in said(host_plan())
    assert "while there is room" not in said(host_plan(1024, 1024))


def test_without_windows_inside_and_without_full_attention() -> None:
    none_inside = host_plan(0, 0)
    assert none_inside.spaced_tokens == 0
    assert "inside prompts: no window is kept" in said(none_inside)
    shape = shape_for(BUDGET, (WINDOW,), 1)
    alone = HostPlan.of(shape, GEOMETRY, "x", Recompute(1024, 1024))
    assert alone.tokens == alone.token_bytes == 0
    assert alone.windows == pytest.approx(BUDGET / 1000 / 8, rel=0.01)
    assert "full attention" not in said(alone)
