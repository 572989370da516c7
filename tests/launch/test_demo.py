"""The demo compares like with like."""

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


class FakeServer:
    """A server process that starts, or has ended."""

    def __init__(self, log: Path) -> None:
        self.log, self.port, self.stopped = log, 1, False

    def stop(self) -> int:
        """See Server."""
        self.stopped = True
        return 0

    def complaints(self) -> str:
        """See Server."""
        return ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeServer]:
    """Servers that the demo has started, which answer at once."""
    servers: list[FakeServer] = []

    def start(_: list[str], log: Path, __: dict[str, str]) -> FakeServer:
        servers.append(FakeServer(log))
        return servers[-1]

    monkeypatch.setattr(demo, "start", start)
    monkeypatch.setattr(demo, "wait_until_ready", lambda _: None)
    return servers


def test_a_server_that_does_not_start_is_one_line_with_its_log(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeServer], tmp_path: Path
) -> None:
    def wait(server: FakeServer) -> None:
        if server is started[1]:
            raise ServerError("server exited with 1:\nTraceback and so on")

    monkeypatch.setattr(demo, "wait_until_ready", wait)
    with pytest.raises(SystemExit) as ended:
        demo.run(demo.parse_args(["--out", str(tmp_path)]), tmp_path)
    log = tmp_path / "server_stock_hicache.log"
    assert ended.value.code == f"{demo.STOCK_HOST}: server exited with 1; see {log}"
    assert [server.stopped for server in started] == [True] * 3


def test_each_server_is_measured_beside_the_same_others(
    monkeypatch: pytest.MonkeyPatch, started: list[FakeServer], tmp_path: Path
) -> None:
    def load(arguments: list[str]) -> list[dict[str, Any]]:
        assert [server.stopped for server in started] == [False] * 3
        given = dict.fromkeys(("host", "port", "model_path", "log_file", "num_clients"))
        return [{"arguments": given, "tag": arguments[arguments.index("--tag") + 1]}]

    monkeypatch.setattr(demo.multiturn, "main", load)
    results = demo.run(demo.parse_args(["--out", str(tmp_path)]), tmp_path)
    told = {name: (result["tag"], list(result["arguments"])) for name, result in results.items()}
    assert told == {name: (name, ["num_clients"]) for name in demo.CONFIGURATIONS}
    assert [server.stopped for server in started] == [True] * 3


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
