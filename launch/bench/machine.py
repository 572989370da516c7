"""Where a figure was measured, for the reports of benches."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERSIONS = ("sglang", "sglang-ext", "torch", "numpy", "numba")


def facts() -> dict[str, Any]:
    """Versions, and what the machine is."""
    return {
        "versions": {name: version(name) for name in VERSIONS},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
