"""Parts of the bench for a GPU that do not come to their end: child processes of
``test_bench_gpu_checks``, with few imports."""

import os
import signal
import subprocess

from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import Setting


def measures_and_dies(name: str, setting: Setting) -> None:
    """One whose process ends in the middle, and leaves a server behind."""
    _measured(setting)
    os.kill(os.getpid(), signal.SIGSEGV)


def measures_and_hangs(name: str, setting: Setting) -> None:
    """One that waits for an answer that does not come."""
    _measured(setting)
    signal.pause()


def _measured(setting: Setting) -> None:
    Record(setting.report).put({"verdict": "equal", "different": 0}, "cells", "one")
    server = subprocess.Popen(["sleep", "600"], start_new_session=True)
    setting.processes.write_text(f"{server.pid}\n")
