"""Real servers in a second instead of half a minute: forked from a process that has imported the
engine already.

For loops that start a server a hundred times. The server is the real one, with its own scheduler
and detokenizer processes; only the imports are shared.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.server import Server, free_port


def load(environment: Mapping[str, str]) -> None:
    """Import the engine, once; ``environment`` must be that of all servers."""
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    # the engine asks for fresh interpreters, which would import everything again
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401


class Forked:
    """The part of ``subprocess.Popen`` that ``Server`` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the timeout is not needed here."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def start(arguments: Sequence[str], log: Path) -> Server:
    """As ``launch.server.start``, after ``load``."""
    port = free_port()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with log.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = ["launch_server", "--host", "127.0.0.1", "--port", str(port), *arguments]
        try:
            runpy.run_module("sglang.launch_server", run_name="__main__")
        finally:
            os._exit(1)
    return Server(Forked(pid), port, log)  # type: ignore[arg-type]
