"""A port that was told is nobody else's before its server listens, seconds later."""

import inspect
import subprocess
import sys
from pathlib import Path

from sglang.srt.utils.network import get_free_port_below_ephemeral

from launch.server import PORTS, free_port, free_ports
from tests.conftest import ROOT

MOONCAKE = (range(12300, 14301), range(15000, 17001))
"""Where its clients and its transfers look for ports: ``AutoPortBinder``,
``findAvailableTcpPort``."""


def test_nobody_else_hands_out_the_ports_of_servers() -> None:
    system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    engine = inspect.signature(get_free_port_below_ephemeral).parameters["low"].default
    assert {free_port() for _ in range(100)} <= set(PORTS)
    assert PORTS.stop <= min(system, engine)
    assert all(ports.stop <= PORTS.start for ports in MOONCAKE)


def test_no_port_is_told_twice() -> None:
    single = [free_port() for _ in range(20)]
    rows = [range(first, first + 7) for first in (free_ports(7) for _ in range(20))]
    told = single + [port for row in rows for port in row]
    assert len(set(told)) == len(told)


def test_none_is_told_by_two_processes() -> None:
    """However many both of them ask for."""
    told = {free_port() for _ in range(600)}
    ask = "from launch.server import free_port; print(*(free_port() for _ in range(600)))"
    others = [
        subprocess.run(
            [sys.executable, "-c", ask], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert all(told.isdisjoint(map(int, ports)) for ports in others)
