"""Is there enough host memory, and can it be had quickly?"""

from collections.abc import Iterator

from sglang_ext.doctor.finding import Finding, fault, note, ok
from sglang_ext.doctor.machine import HUGE_BYTES, Machine
from sglang_ext.planning.launch_line import HOST_OPTIONS
from sglang_ext.planning.table import size

RESERVE_BYTES = 10 * 1024**3
"""Memory that the engine leaves to others when it looks for that of a host tier."""
_MANY_BYTES = 50e9
"""Memory of a rank that takes long to allocate with one thread."""
THREADS = "SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS"
HUGE = "SGLANG_HUGEPAGE_SIZE"


def check(machine: Machine, budget: int | None, ranks: int, *, pinned: bool) -> Iterator[Finding]:
    """Args:
    budget: bytes of host memory of a rank; None if that is not known.
    ranks: on this machine.
    pinned: whether the memory is registered with CUDA.
    """
    yield _budget(machine, budget, ranks)
    yield _memlock(machine, budget, pinned=pinned)
    yield _hugepages(machine, budget, ranks)
    yield _threads(machine, budget)
    if machine.numa_nodes == 1:
        yield ok("NUMA", "one node")
    else:
        said = f"{machine.numa_nodes} nodes"
        yield note("NUMA", said, "--numa-node puts each rank on the node of its GPU")


def _budget(machine: Machine, budget: int | None, ranks: int) -> Finding:
    there = f"{size(machine.available)} available"
    bounds = {"memory": machine.available}
    if machine.cgroup_left is not None:
        there += f", {size(machine.cgroup_left)} left in the cgroup"
        bounds["cgroup"] = machine.cgroup_left
    if budget is None:
        advice = f"give {HOST_OPTIONS} after --, and --max-total-tokens with the second"
        return note("host memory", f"{there}; the budget is not known", advice)
    smallest = min(bounds, key=lambda name: bounds[name])
    most = max(0, bounds[smallest] - RESERVE_BYTES)
    asked = f"{size(budget)} a rank on {ranks}: {size(budget * ranks)}"
    if budget * ranks <= most:
        return ok("host memory", f"{asked}; {there}")
    what = {
        "memory": "the machine has no more; use a smaller one",
        "cgroup": "raise the container's memory limit, or use a smaller one",
    }
    return fault(
        "host memory",
        f"{asked}, but the {smallest} has {size(most)} for it ({there}, "
        f"{size(RESERVE_BYTES)} are left to others)",
        f"{HOST_OPTIONS}: {what[smallest]}, of at most {most / ranks / 1e9:.1f} GB a rank",
    )


def _memlock(machine: Machine, budget: int | None, *, pinned: bool) -> Finding:
    if machine.memlock is None:
        return ok("ulimit -l", "unlimited")
    said = f"{size(machine.memlock)} may be locked"
    if not pinned:
        return ok("ulimit -l", f"{said}; without CUDA nothing is")
    advice = "ulimit -l unlimited, or docker run --ulimit memlock=-1"
    if budget is None:
        return note("ulimit -l", said, advice)
    if machine.memlock < budget:
        return fault("ulimit -l", f"{said}, {size(budget)} a rank are to be pinned", advice)
    return ok("ulimit -l", said)


def _hugepages(machine: Machine, budget: int | None, ranks: int) -> Finding:
    asked = machine.environment.get(HUGE, "").strip().upper()
    free = ", ".join(f"{count} of {name}" for name, count in machine.free_hugepages.items())
    if not asked:
        return ok("hugepages", f"not asked for ({HUGE}); free: {free}")
    if asked not in HUGE_BYTES:
        return fault("hugepages", f"{HUGE}={asked} is not a size", f"use {' or '.join(HUGE_BYTES)}")
    have = machine.free_hugepages.get(asked, 0) * HUGE_BYTES[asked]
    if budget is not None and have < budget * ranks:
        return fault(
            "hugepages",
            f"{size(have)} of {asked} are free, {size(budget * ranks)} are needed; the engine "
            "would take small pages",
            f"reserve {-(-budget * ranks // HUGE_BYTES[asked])} of them, or unset {HUGE}",
        )
    return ok("hugepages", f"{size(have)} of {asked} are free")


def _threads(machine: Machine, budget: int | None) -> Finding:
    text = machine.environment.get(THREADS, "").strip() or "0"
    if not text.isdigit():
        return fault("parallel allocation", f"{THREADS}={text} is no number", "use a whole number")
    threads = int(text)
    if threads == 0 and budget is not None and budget >= _MANY_BYTES:
        wanted = min(16, machine.cpus)
        said = f"one thread allocates {size(budget)} a rank, which may take minutes"
        return note("parallel allocation", said, f"set {THREADS}={wanted}")
    if threads and machine.environment.get(HUGE, "").strip():
        return note("parallel allocation", f"{THREADS} does nothing with {HUGE}")
    return ok("parallel allocation", f"{threads or 1} threads")
