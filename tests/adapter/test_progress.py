"""Long steps of a start are told of while they last."""

import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sglang_ext.adapter import memory_watch
from sglang_ext.adapter.progress import memory_progress, progress


def test_a_long_step_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    asked, told = threading.Event(), iter(range(1, 1000))

    def done() -> str:
        if (number := next(told)) == 2:
            asked.set()
        return f"part {number}"

    with caplog.at_level(logging.INFO), progress("memory is pinned", done, every_s=0.01):
        assert asked.wait(120)
    assert re.search(r"memory is pinned: \d+ s, part 1$", caplog.messages[0])
    assert "sglang-ext start" not in {thread.name for thread in threading.enumerate()}


def test_a_short_step_and_a_failed_one_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with progress("kernels are compiled"):
            raise ValueError("no compiler")

    with caplog.at_level(logging.INFO), progress("kernels are compiled"):
        pass
    with pytest.raises(ValueError, match="no compiler"):
        fail()
    assert not caplog.messages


def test_memory_of_a_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t  1000 kB\nHugetlbPages:\t 500 kB\n")
    assert memory_watch.resident(status) == 1500 * 1024
    assert memory_watch.resident(tmp_path / "none") == 0


WAITS = """
import os, sys
from sglang_ext.adapter.progress import memory_progress
with memory_progress(5 * 10**9, every_s=0.01):
    sys.stdin.readline()
print("allocated", flush=True)
"""


def test_another_process_tells_while_this_one_cannot() -> None:
    """It waits in a call; the line is there before the call ends."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stderr.readline()
        assert re.search(r"sglang-ext: host memory is allocated: \d+ s, 0.00 of 5.00 GB$", line)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "allocated\n"
        assert process.wait() == 0


def test_little_memory_needs_nobody_who_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with memory_progress(10**9):
        assert os.getpid()
