"""The engine's host pools as views of one memory."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_pages_of_both_components_come_back_in_every_layout() -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.adapter.arena_views"],
        capture_output=True,
        text=True,
        env={**os.environ, "SGLANG_PLATFORM": "ext_cpu"},
        cwd=ROOT,
        check=False,
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, child.stderr[-2000:]
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines), lines
