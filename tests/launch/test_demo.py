"""The demo compares like with like."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import demo
from launch.server import OURS, ServerError


def test_both_host_tiers_have_the_same_options_beside_the_cache() -> None:
    alone, stock, ours = demo.CONFIGURATIONS.values()
    assert not alone
    assert "--enable-hierarchical-cache" in stock
    assert ours == (*OURS, *stock)


def test_a_server_that_does_not_start_is_one_line_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def running(*_: Any) -> Iterator[None]:
        raise ServerError("server exited with 1:\nTraceback and so on")
        yield

    monkeypatch.setattr(demo, "running", running)
    args = demo.parse_args(["--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        demo.run(args, tmp_path, demo.STOCK)
    log = tmp_path / "server_stock_device_only.log"
    assert ended.value.code == f"{demo.STOCK}: server exited with 1; see {log}"


def result(scale: float) -> dict[str, dict[str, float] | float]:
    """What a run measured."""
    return {
        "hit_rate": {"total": 0.2 * scale, "device": 0.1, "host": 0.1},
        "ttft_s": {"mean": scale, "p50": scale, "p99": scale},
        "latency_s": {"mean": scale},
        "throughput": {"input_tokens_per_s": scale, "output_tokens_per_s": scale},
        "wall_s": scale,
    }


def test_the_ratio_is_that_of_ours_to_hicache(capsys: pytest.CaptureFixture[str]) -> None:
    demo.print_table(dict(zip(demo.CONFIGURATIONS, map(result, (1, 2, 3)), strict=True)))
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert all(name in head for name in demo.CONFIGURATIONS)
    assert rows[0].split() == ["hit", "rate", "0.200", "0.400", "0.600", "1.50"]
