"""What the machine, and the container on it, have for host memory."""

import dataclasses
import os
import resource
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

_HUGE = {"2MB": "hugepages-2048kB", "1GB": "hugepages-1048576kB"}
"""Folders of the kernel by the engine's names of sizes."""
_NO_LIMIT = 1 << 60
HUGE_BYTES = {"2MB": 2 * 1024**2, "1GB": 1024**3}


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Figures of now.

    Attributes:
        available: bytes of memory that processes can get, page cache included.
        cgroup_left: bytes that the cgroup of this process still allows; None without a limit.
        memlock: bytes that a process may lock; None without a limit.
        free_hugepages: number of them, by the engine's name of their size.
        numa_nodes: nodes that have memory.
        cpus: that this process may use.
        environment: variables.
    """

    available: int
    cgroup_left: int | None
    memlock: int | None
    free_hugepages: Mapping[str, int]
    numa_nodes: int
    cpus: int
    environment: Mapping[str, str]

    @classmethod
    def here(cls, proc: Path = Path("/proc"), system: Path = Path("/sys")) -> "Machine":
        """This machine.

        Args:
            proc, system: where the kernel's files are.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        huge = system / "kernel/mm/hugepages"
        return cls(
            available=_available(proc / "meminfo"),
            cgroup_left=cgroup_left(proc / "self/cgroup", system / "fs/cgroup"),
            memlock=None if limit == resource.RLIM_INFINITY else limit,
            free_hugepages={
                name: _number(huge / folder / "free_hugepages") or 0
                for name, folder in _HUGE.items()
            },
            numa_nodes=max(1, len(list((system / "devices/system/node").glob("node[0-9]*")))),
            cpus=len(os.sched_getaffinity(0)),
            environment=dict(os.environ),
        )


def _available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ValueError(f"{meminfo} does not say how much memory is available")


def cgroup_left(membership: Path, root: Path) -> int | None:
    """Bytes that the cgroup of a process and those above it still allow; None without a limit.

    Args:
        membership: ``/proc/self/cgroup``.
        root: where cgroups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    left: int | None = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limits = root, ["memory.max", "memory.high"]
            usage, cache = "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limits = root / "memory", ["memory.limit_in_bytes"]
            usage, cache = "memory.usage_in_bytes", "total_"
        else:
            continue
        for folder in _folders(top, path):
            bounds = [found for name in limits if (found := _number(folder / name)) is not None]
            used = _number(folder / usage)
            if not bounds or used is None:
                continue
            here = max(0, min(bounds) - max(0, used - _page_cache(folder, cache)))
            left = here if left is None else min(left, here)
    return left


def _folders(top: Path, path: str) -> list[Path]:
    """Of a cgroup and those above it. In a container the path may be one of the host, and the
    container's own cgroup is at the top."""
    parts = PurePosixPath(path).parts[1:]
    if not top.joinpath(*parts).is_dir():
        return [top]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _page_cache(folder: Path, prefix: str) -> int:
    """Bytes that the kernel takes back when they are wanted."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split() for line in lines)
    return sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _number(file: Path) -> int | None:
    """What a file of the kernel says; None if it is not there or sets no limit, for which older
    kernels have a number that no machine has."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
