"""What a server's metrics say."""

import time

from launch.server import Server

_PUBLISHED_WITHIN_S = 1.5
"""An idle server looks for something to do once a second, and then publishes what it has done."""


def settled(server: Server) -> str:
    """The metrics of a server that has nothing to do, when they have what it has done last."""
    time.sleep(_PUBLISHED_WITHIN_S)
    return server.get("/metrics")


def metric(text: str, name: str, label: str = "") -> float:
    """Sum of a metric's samples; with a ``label``, of those that have it.

    Args:
        text: what the server answers to ``/metrics``.
    """
    lines = (line for line in text.splitlines() if line.startswith(name + "{") and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)
