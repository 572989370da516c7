"""Tells how much memory another process has got, until its standard input is closed.

    python memory_watch.py PID BYTES SECONDS

A program of its own, with nothing but the standard library: the engine allocates host memory in one
call that keeps the interpreter for itself, for minutes where there is much of it.
"""

import select
import sys
import time
from pathlib import Path

_MEMORY = ("VmRSS", "HugetlbPages")


def resident(status: Path) -> int:
    """Bytes that a process has.

    Args:
        status: the kernel's file of the process; 0 if there is none.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    fields = (line.partition(":") for line in lines)
    return sum(int(value.split()[0]) * 1024 for name, _, value in fields if name in _MEMORY)


def watch(status: Path, wanted: int, every_s: float) -> None:
    """A line from time to time, on the standard error.

    Args:
        wanted: bytes that the process is going to get.
    """
    before, began = resident(status), time.monotonic()
    while not select.select([sys.stdin], [], [], every_s)[0]:
        got = min(wanted, max(0, resident(status) - before))
        print(
            f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] sglang-ext: host memory is allocated: "
            f"{time.monotonic() - began:.0f} s, {got / 1e9:.2f} of {wanted / 1e9:.2f} GB",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    watch(Path(f"/proc/{sys.argv[1]}/status"), int(sys.argv[2]), float(sys.argv[3]))
