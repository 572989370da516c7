"""What pins and drops may change."""

import math

from sglang_ext.testing.model_page import RESERVED, States
from sglang_ext.testing.watch import require

CALLS = (
    ("pins", "add", True),
    ("pins", "remove", False),
    ("drops", "prompt", False),
    ("drops", "namespace", False),
)
"""Calls of an operator: the part of the cache, its method, and whether that makes a window worth
keeping."""
MOST = (1 << 62, math.inf)
"""Worth of what somebody asks for: more than that of any page."""


def check(before: States, after: States) -> None:
    """No copy appears. One that goes without its page was reserved by a backup that was given up,
    or is of a window that nobody needs any more."""
    require(after.keys() <= before.keys(), "a call of an operator made a page")
    for key, states in after.items():
        device, host, swa_device, swa_host = before[key]
        require((states[0], states[2]) == (device, swa_device), "a page left the device alone")
        require(states[1] == host or (host == RESERVED and not states[1]), "a host copy went")
        require(states[3] in (swa_host, 0), "a window appeared")
