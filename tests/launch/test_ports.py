"""Ports of servers: connections must not get them before the server listens."""

import socket
from pathlib import Path

import pytest

from launch import server


def test_a_port_is_none_that_connections_get(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = server._first_of_connections()
    assert all(10000 <= server.free_port() < ours for _ in range(50))
    some = tmp_path / "range"
    monkeypatch.setattr(server, "_PORT_RANGE", some)
    some.write_text("20010\t60999\n")
    assert all(10000 <= server.free_ports(10) <= 20000 for _ in range(20))


@pytest.mark.parametrize("text", [None, "", "many\n", "1024\t65535\n"])
def test_where_the_system_says_nothing_of_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    some = tmp_path / "range"
    if text is not None:
        some.write_text(text)
    monkeypatch.setattr(server, "_PORT_RANGE", some)
    assert server._first_of_connections() == 32768


def test_a_port_in_use_is_no_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = server.free_port()
    tried = iter([taken, taken, taken + 1, taken + 2])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        monkeypatch.setattr("random.randrange", lambda *_: next(tried))
        assert server.free_port() != taken
