"""Shared test configuration."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fixtures.zygote import Zygote  # noqa: E402

LONGEST_FIRST = (
    "tests/e2e/test_token_exact.py",
    "tests/e2e/test_server.py",
    "tests/e2e/test_storage.py",
    "tests/e2e/test_operations.py",
    "tests/e2e/test_models.py",
    "tests/e2e/test_launch_lines.py",
    "tests/e2e/test_drafts.py",
    "tests/e2e/test_draft_tiers.py",
    "tests/e2e/test_dp_drafts.py",
    "tests/adapter/test_deepseek_v4.py",
    "tests/adapter/test_deepseek_v4_ranks.py",
    "tests/kits/test_kits.py",
    "tests/e2e/test_cache_control.py",
    "tests/e2e/test_scheduler_options.py",
    "tests/e2e/test_weights.py",
    "tests/e2e/test_dp_attention.py",
    "tests/e2e/test_disaggregation.py",
    "tests/e2e/test_pipeline.py",
    "tests/e2e/test_edges.py",
    "tests/e2e/test_patches.py",
    "tests/e2e/test_quick_start.py",
    "tests/e2e/test_mooncake.py",
    "tests/e2e/test_soak.py",
    "tests/e2e/test_storm.py",
    "tests/e2e/test_fp8.py",
    "tests/e2e/test_step.py",
    "tests/e2e/test_inside_a_page.py",
    "tests/e2e/test_window_only.py",
    "tests/kernels/test_copies.py",
    "tests/patches/test_engine_patches.py",
    "tests/tools/test_documented_commands.py",
    "tests/core/test_index_machine.py",
    "tests/sizing/test_bounded_recompute.py",
    "tests/core/test_seeded_bugs.py",
    "tests/core/test_seeded_loop_bugs.py",
    "tests/core/test_storage_bugs.py",
    "tests/core/test_simulation.py",
    "tests/core/test_expiry.py",
    "tests/core/test_golden.py",
    "tests/core/test_quotas.py",
    "tests/storage/test_page_files.py",
    "tests/core/test_retention.py",
    "tests/contract/test_selection.py",
    "tests/launch/test_bench_trace.py",
    "tests/launch/test_bench_gpu_checks.py",
    "tests/doctor/test_doctor.py",
    "tests/core/test_pressure.py",
)
"""Files that take longest, in the order in which they are begun, so that workers end together."""

_LOOPS = "sglang_ext.core.compiled"
HALVES = (
    (f"{_LOOPS}.loop_sets", "sglang_ext.kernels.page_copy.cpu_loops"),
    (
        *(f"{_LOOPS}.candidates", f"{_LOOPS}.kept", f"{_LOOPS}.arena"),
        *(f"{_LOOPS}.least_worth", f"{_LOOPS}.ghost", f"{_LOOPS}.scans", f"{_LOOPS}.copies"),
    ),
)
"""Modules that bring all compiled loops, for two processes: hardly a loop is in both halves."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is run."""
    parser.addoption("--full", action="store_true", help="also what is marked as full")
    group = parser.getgroup("kits")
    group.addoption("--all-kits", action="store_true", help="every kit on every kind of server")
    group.addoption("--kits-out", type=Path, help="JSON file that gets the results")


def pytest_configure(config: pytest.Config) -> None:
    """Have the loops compiled before there are workers, each of which would do it at once."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        command = [sys.executable, "-W", "ignore", "-c"]
        texts = [f"import {', '.join(modules)}" for modules in HALVES]
        running = [subprocess.Popen([*command, text], cwd=ROOT) for text in texts]
        assert [half.wait() for half in running] == [0, 0], "the loops were not compiled"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as full, unless it is asked for; longest files first."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether all seeds of seeded traffic are asked for, as long runs are: else a part will do."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks servers from a process that has imported the engine."""
    process = Zygote()
    yield process
    process.close()


def engine_child(module: str, *arguments: str) -> list[str]:
    """Lines that a module prints in a process of its own: the engine keeps process-wide
    state."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "SGLANG_PLATFORM": "ext_cpu"},
        cwd=ROOT,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout.splitlines()


settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
