"""Times of scheduler steps, of any cache: what the scheduler does between forward passes.

With ``EXT_CPU_STEP_TIMES=FILE`` every forward pass adds a line to the file: the seconds since the
one before ended, those of them that the scheduler's thread was running, and the pass's own. The
second number leaves out what other threads and processes took of few cores. Steps behind an idle
loop are left out: the time there was nobody's.
"""

import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "EXT_CPU_STEP_TIMES"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def install() -> None:
    """Hook the scheduler, if the variable is set."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = os.environ.get(VARIABLE)
    if path is None:
        return
    steps = _Steps(Path(path))
    HookRegistry.register(f"{_SCHEDULER}.run_batch", steps.forward, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.on_idle", steps.idle, HookType.AROUND)


class _Steps:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._ended: tuple[float, float] | None = None

    def forward(self, original: Any, *arguments: Any, **named: Any) -> Any:
        start, running = time.perf_counter(), time.thread_time()
        result = original(*arguments, **named)
        end, ended_running = time.perf_counter(), time.thread_time()
        if self._ended is not None:
            # opened by the scheduler's process: every process of the server installs the hook
            self._file = self._file or self._path.open("w", buffering=1)
            between, ran = start - self._ended[0], running - self._ended[1]
            self._file.write(f"{between:.7f} {ran:.7f} {end - start:.7f}\n")
        self._ended = end, ended_running
        return result

    def idle(self, original: Any, *arguments: Any, **named: Any) -> Any:
        self._ended = None
        return original(*arguments, **named)
