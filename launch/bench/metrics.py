"""What a server's metrics say."""

import time

from launch.server import Server

_PUBLISHED_WITHIN_S = 0.5
"""Behind a question: an idle server may sleep until it is asked something, and then publishes what
it has done."""
_MOST_S = 120.0
"""After that they are what they are."""
_MOVING = "sglang_ext:transfers_in_flight"


def settled(server: Server) -> str:
    """The metrics of a server that has nothing to do, when they have what it has done last.

    A transfer may end late on a busy machine: none is in flight, and nothing has changed since
    the last look.
    """
    end = time.monotonic() + _MOST_S
    before = None
    while True:
        server.get("/server_info")
        time.sleep(_PUBLISHED_WITHIN_S)
        text = server.get("/metrics")
        ours = sorted(line for line in text.splitlines() if line.startswith("sglang_ext:"))
        is_still = ours == before and not metric(text, _MOVING)
        # a server without our metrics has nothing to wait for
        if is_still or not ours or time.monotonic() > end:
            return text
        before = ours


def metric(text: str, name: str, label: str = "") -> float:
    """Sum of a metric's samples; with a ``label``, of those that have it.

    Args:
        text: what the server answers to ``/metrics``.
    """
    lines = (line for line in text.splitlines() if line.startswith(name + "{") and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)
