"""A port that was told is nobody else's before its server listens, seconds later."""

import inspect
from pathlib import Path

from sglang.srt.utils.network import get_free_port_below_ephemeral

from launch.server import PORTS, free_port, free_ports


def test_neither_the_system_nor_the_engine_hands_out_the_ports_of_servers() -> None:
    system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    engine = inspect.signature(get_free_port_below_ephemeral).parameters["low"].default
    assert {free_port() for _ in range(100)} <= set(PORTS)
    assert PORTS.stop <= min(system, engine)


def test_no_port_is_told_twice() -> None:
    single = [free_port() for _ in range(20)]
    rows = [range(first, first + 7) for first in (free_ports(7) for _ in range(20))]
    told = single + [port for row in rows for port in row]
    assert len(set(told)) == len(told)
