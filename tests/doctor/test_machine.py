"""What the kernel says of memory, from files like its own."""

from pathlib import Path

import pytest

from sglang_ext.doctor.machine import Machine, cgroup_left

GB = 10**9


def cgroup(folder: Path, limit: str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.high").write_text("max\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {cache}\ninactive_file {cache}\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("0::/pod/container\n")
    return file


def test_the_smallest_of_the_limits_above(membership: Path, tmp_path: Path) -> None:
    root = tmp_path / "fs"
    cgroup(root / "pod", str(20 * GB), 5 * GB, cache=GB)
    cgroup(root / "pod" / "container", "max", 5 * GB)
    assert cgroup_left(membership, root) == 17 * GB
    cgroup(root / "pod" / "container", str(8 * GB), 5 * GB)
    assert cgroup_left(membership, root) == 3 * GB
    cgroup(root / "pod" / "container", str(2 * GB), 5 * GB)
    assert cgroup_left(membership, root) == 0


def test_a_container_sees_its_own_cgroup_at_the_top(membership: Path, tmp_path: Path) -> None:
    root = tmp_path / "fs"
    cgroup(root, str(10 * GB), 4 * GB)
    assert cgroup_left(membership, root) == 6 * GB


def test_without_a_limit(membership: Path, tmp_path: Path) -> None:
    root = tmp_path / "fs"
    assert cgroup_left(tmp_path / "none", root) is None
    cgroup(root, "max", GB)
    assert cgroup_left(membership, root) is None


def test_cgroups_of_the_first_version(tmp_path: Path) -> None:
    file, memory = tmp_path / "cgroup", tmp_path / "fs" / "memory" / "job"
    file.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    memory.mkdir(parents=True)
    (memory / "memory.usage_in_bytes").write_text(str(3 * GB))
    (memory / "memory.stat").write_text(f"total_active_file {GB}\ntotal_inactive_file 0\n")
    (memory / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert cgroup_left(file, tmp_path / "fs") is None
    (memory / "memory.limit_in_bytes").write_text(str(10 * GB))
    assert cgroup_left(file, tmp_path / "fs") == 8 * GB


def test_this_machine() -> None:
    here = Machine.here()
    assert 0 < here.available < 10**15
    assert here.cpus > 0
    assert here.numa_nodes > 0
    assert set(here.free_hugepages) == {"2MB", "1GB"}


def test_a_machine_of_files(tmp_path: Path) -> None:
    proc, system = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  1000 kB\n")
    for node in ("node0", "node1"):
        (system / "devices/system/node" / node).mkdir(parents=True)
    pages = system / "kernel/mm/hugepages/hugepages-1048576kB"
    pages.mkdir(parents=True)
    (pages / "free_hugepages").write_text("7\n")
    found = Machine.here(proc, system)
    assert (found.available, found.cgroup_left, found.numa_nodes) == (1_024_000, None, 2)
    assert found.free_hugepages == {"2MB": 0, "1GB": 7}
    (proc / "meminfo").write_text("MemTotal: 9 kB\n")
    with pytest.raises(ValueError, match="available"):
        Machine.here(proc, system)
