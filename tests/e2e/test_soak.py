"""A short soak: a pool so tight that requests are retracted, late copies, clients that go."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_a_tight_server_serves_every_request_and_every_token(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    # on one core the server does not compete with the OpenMP threads of its own
    core = min(os.sched_getaffinity(0))
    options = ["--only", "tight-late", "--minutes", "0.75", "--conversations", "12"]
    options += ["--clients", "16", "--cores", str(core), "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.soak.server", *options], cwd=ROOT, check=False
    )
    (result,) = json.loads(out.read_text())["configurations"]
    assert run.returncode == 0, result
    assert result["requests"]["completed"] > 20, result
    assert result["requests"]["aborted"] > 0, result
    assert result["cache_events"]["loaded_window_pages"] > 0, result
