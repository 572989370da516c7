"""Memory that the engine leaves free beside its host pools, on machines that have little.

It starts no server with a host tier unless 10 GiB stay free. Several servers side by side cannot
leave as much on a small machine; ``EXT_CPU_HOST_RESERVE_GB=N`` says how much they leave.
"""

import os

VARIABLE = "EXT_CPU_HOST_RESERVE_GB"


def install() -> None:
    """Replace the engine's figure, if the variable is set."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    from sglang.srt.mem_cache.pool_host import base

    if not hasattr(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES"):
        raise AttributeError("the engine keeps its reserve of host memory under another name")
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = int(float(wanted) * 1024**3)
