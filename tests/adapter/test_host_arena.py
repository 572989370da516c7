"""The engine's host pools as views of one memory."""

from tests.conftest import engine_child


def test_pages_of_both_components_come_back_in_every_layout() -> None:
    lines = engine_child("tests.adapter.arena_views")
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines), lines
