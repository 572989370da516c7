"""A short soak: a pool so tight that requests are retracted, late copies, clients that go; with
drafts too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.fixtures.zygote import Zygote
from tests.soak.server import parse_args, passed, soak

LEAST = 25
"""Requests that are completed, on a slow machine later than after the time that is given here."""
OPTIONS = ["--only", "tight-late", "--conversations", "12", "--clients", "16"]
OPTIONS += ["--least", str(LEAST)]


def assert_served(result: dict[str, Any]) -> None:
    """It came to what a soak is for."""
    wrong = {name: result.get(name) for name in ("failures", "differences", "bad_lines")}
    assert passed(result), json.dumps(wrong, indent=1)
    assert result["requests"]["completed"] >= LEAST, result
    assert result["requests"]["aborted"] > 0, result
    assert result["cache_events"]["loaded swa"] > 0, result


def test_a_tight_server_serves_every_request_and_every_token(
    zygote: Zygote, tmp_path: Path, full: bool
) -> None:
    args = parse_args([*OPTIONS, "--out", str(tmp_path / "soak.json")])
    assert_served(soak("tight-late", 0.25 if full else 0.08, args, {}, zygote.running))


@pytest.mark.full
@pytest.mark.parametrize("drafts", ["mimo-v2", "eagle3", "standalone"])
def test_one_with_drafts_does_too(zygote: Zygote, tmp_path: Path, drafts: str) -> None:
    """Their KV is packed into the windows' pages, or beside those of full attention. Expected
    answers are of a server that neither drafts nor caches."""
    args = parse_args([*OPTIONS, "--drafts", drafts, "--out", str(tmp_path / "soak.json")])
    result = soak("tight-late", 0.5, args, {}, zygote.running)
    assert_served(result)
    assert result["drafts"]["proposals"] > 0, result
    # random drafts stand by chance, those of the target itself because they are right
    if drafts == "standalone":
        assert result["drafts"]["accepted"] > result["drafts"]["proposals"], result


@pytest.mark.full
def test_the_command_does_it_longer(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    # on one core the server does not compete with the OpenMP threads of its own
    options = [*OPTIONS, "--minutes", "0.75", "--cores", str(min(os.sched_getaffinity(0)))]
    command = [sys.executable, "-m", "tests.soak.server", *options, "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, check=False)
    (result,) = json.loads(out.read_text())["configurations"]
    assert run.returncode == 0, result
    assert_served(result)
