"""Shapes of the bench of servers in turns, and how a host is filled before it is measured."""

import dataclasses
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.bench import multiturn, pairs
from launch.models import tiny
from launch.server import OURS

PAGE = 64
FILLER = {"num-clients": 10, "num-rounds": 1}


def host_pages(name: str) -> float:
    """Pages of the host pool of a server of ``host-size``."""
    shape = pairs.SHAPES["host-size"]
    options = list(shape.servers[name])
    return float(options[options.index("--hicache-ratio") + 1]) * shape.device_tokens / PAGE


@pytest.mark.parametrize("name", pairs.SHAPES)
def test_what_a_shape_says_can_be_sent(name: str) -> None:
    shape = pairs.SHAPES[name]
    assert pairs.parse_args(["--shape", name]).shape == name
    assert shape.model in tiny.SIZES
    assert list(shape.servers[list(shape.servers)[-1]])[: len(OURS)] == list(OURS)
    for load in (shape.load, shape.filler):
        multiturn.parse_args([f"--{key}={value}" for key, value in load.items()])


def test_hosts_differ_in_nothing_but_their_size() -> None:
    servers = pairs.SHAPES["host-size"].servers
    assert not servers[pairs.STOCK]
    assert servers[pairs.OURS_LARGE] == (*OURS, *servers[pairs.STOCK_HOST])
    assert servers[pairs.OURS_LARGE][:-1] == servers[pairs.OURS_SMALL][:-1]
    assert host_pages(pairs.STOCK_HOST) == host_pages(pairs.OURS_LARGE) == 100_000
    assert host_pages(pairs.OURS_SMALL) == 2_000


def test_a_pause_is_no_time_between_passes(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.write_text("0.001 0.001 0.002\n" * 2)
    stub: Any = None
    server = pairs.PausedServer(stub, steps)
    assert len(server.new_steps()) == 1
    with steps.open("a") as more:
        more.write("180.0 0.001 0.002\n0.003 0.001 0.002\n")
    assert server.new_steps().tolist() == [[0.003, 0.001, 0.002]]


class Host:
    """Stands in for a server: its host takes what it is sent until it is full."""

    def __init__(self, size: int) -> None:
        self.size, self.sent = size, 0
        self.seeds: list[int] = []

    def use(self, server: object) -> dict[str, float]:
        used = min(self.sent, self.size)
        part = used / self.size if self.size else 0.0
        return {"used": part, "used_tokens": used, "total_tokens": self.size}

    def send(self, server: object, load: dict[str, int], model: Path, seed: int) -> None:
        self.sent += load["num-clients"]
        self.seeds.append(seed)


@pytest.mark.parametrize(("size", "loads"), [(0, 1), (35, 5), (10, 2), (5, 2)])
def test_a_host_is_filled_until_it_holds_no_more(
    size: int, loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, server = Host(size), object()
    monkeypatch.setattr(pairs, "host_use", host.use)
    monkeypatch.setattr(pairs, "send", host.send)
    shape = dataclasses.replace(pairs.SHAPES["host-size"], filler=FILLER)
    stub: Any = server
    found = pairs.fill(stub, shape, Path())
    assert found["prompts"] == 10 * loads
    assert found["used"] == (1.0 if size else 0.0)
    # no prompt comes twice, and none is one of a turn
    assert host.seeds == [pairs.FIRST_FILLER + n for n in range(loads)]


def test_a_load_that_is_not_answered_ends() -> None:
    load = {"num-clients": 2, "num-rounds": 1, "request-length": 8, "output-length": 1}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server: Any = SimpleNamespace(port=listening.getsockname()[1])
        with pytest.raises(TimeoutError):
            pairs.send(server, load, Path(), seed=1, limit_s=0.5)
