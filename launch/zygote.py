"""Real servers in seconds instead of half a minute: forked from a process that has imported the
engine already.

For whoever starts servers by the dozen: loops that kill them, end-to-end tests. The server is the
real one, with its own scheduler and detokenizer processes; only the imports are shared.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.mooncake import environment as mooncake_environment
from launch.server import CPU, STRICT_CHECKS, Server, free_port, inherited, wait_until_healthy

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """The part of ``subprocess.Popen`` that ``Server`` needs, of a server below a zygote."""

    def __init__(self, zygote: "Zygote", pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._status: int | None = None

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self._status is None:
            self._status = self._zygote.ask({"poll": self.pid})
        return self._status

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it did not come in time.
        """
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            time.sleep(0.05)
        return status


class Zygote:
    """A process that has imported the engine, and forks a server whenever it is asked to.

    All of its servers make the engine's strict checks. Other variables reach a server too, but
    not those that the engine reads when it is imported.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # libraries are searched for where they were when the process began, and the engine reads
        # some of its checks when it is imported
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "launch.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**inherited(), **mooncake_environment(), **CPU, **STRICT_CHECKS},
        )

    def ask(self, question: dict[str, Any]) -> Any:
        """One question, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> Server:
        """As ``launch.server.start``."""
        port = free_port()
        arguments = ["--host", "127.0.0.1", "--port", str(port), *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        question = {"start": arguments, "log": str(log), "environment": dict(environment or {})}
        return Server(Forked(self, self.ask(question)), port, log)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def running(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        """As ``launch.server.running``."""
        server = self.start(arguments, log, environment)
        try:
            wait_until_healthy(server)
            yield server
        finally:
            server.stop()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _fork(arguments: list[str], log: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.environ.update(environment)
    with Path(log).open("wb") as output, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["launch_server", *arguments]
    try:
        runpy.run_module("sglang.launch_server", run_name="__main__")
    except SystemExit as end:  # as the interpreter does
        print(end.code, file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _status(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Import the engine, then answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    multiprocessing.set_start_method("fork", force=True)
    # the engine asks for fresh interpreters, which would import everything again
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            answer = _status(question["poll"])
        else:
            answer = _fork(question["start"], question["log"], question["environment"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
