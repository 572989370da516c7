"""Start and stop a real SGLang server on this machine; shared by demo, bench and tests."""

import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_INVARIANT_CHECK": "2",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
}
"""Every check the engine offers: page conservation at busy and at idle, double
frees, allocator invariants."""

_RESERVE = "EXT_CPU_HOST_RESERVE_GB"
CPU = {
    "SGLANG_PLATFORM": "ext_cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # the engine leaves 10 GiB to others, which a small machine may not have at all
    _RESERVE: os.environ.get(_RESERVE, "1"),
}
"""Environment of the CPU reference platform."""

_MOST_OF_A_LINE = 400
_TROUBLE = "(?i)error|exception|fail|lost|refus|timed? ?out|traceback"

OURS = ("--radix-cache-backend", "swa_hicache")
"""Options that select our cache."""

ONE_EACH = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection for each request: one that is kept may be one that the server is just closing."""


def inherited() -> dict[str, str]:
    """This process's variables without those that select a cache or change ours: what servers
    differ in is what their starter says, not what its caller has exported."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SGLANG_EXT_") and name != "SGLANG_PLUGINS"
    }


PORTS = range(17500, 22000)
"""Ports of servers. Mooncake takes its own from 12,300 to 14,300 and from 15,000 to 17,000, the
engine from 22,000 to 29,999, and the system hands out those from 32,768 on: none of them takes one
away before its server listens, seconds later."""

_IN_A_ROW = 500
"""Ports of one process: more than a whole test run asks for."""


@functools.cache
def _own_ports() -> tuple[Iterator[int], socket.socket | None]:
    """Numbers of ports that no other process is told as long as this one runs, and what keeps them:
    a name that only one of them can have. None where all are taken: then anybody's."""
    parts = [range(first, first + _IN_A_ROW) for first in PORTS[::_IN_A_ROW]]
    random.shuffle(parts)
    for part in parts:
        keeper = socket.socket(socket.AF_UNIX)
        try:
            keeper.bind(f"\0sglang-ext ports {part.start}")
        except OSError:
            keeper.close()
        else:
            return itertools.cycle(part), keeper
    return itertools.cycle(PORTS), None


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody uses, and that stays free until somebody listens."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many such ports in a row. No port is told twice until all have been, and none
    by two processes."""
    ports, _ = _own_ports()
    while True:
        row = list(itertools.islice(ports, count))
        first = row[0]
        if row != list(range(first, first + count)):
            continue  # it goes over the end
        with contextlib.ExitStack() as listeners, contextlib.suppress(OSError):
            for port in row:
                listener = listeners.enter_context(socket.socket())
                listener.bind(("127.0.0.1", port))
            return first


def dp_attention(ranks: int) -> list[str]:
    """Options of a server with DP attention, one DP rank for each rank. Left to itself the engine
    takes ports in a row from the ones that connections use, and sometimes finds one in use."""
    several = ["--tp", str(ranks), "--dp", str(ranks), "--enable-dp-attention"]
    return [*several, "--dist-init-addr", f"127.0.0.1:{free_ports(7)}"]


class ServerError(RuntimeError):
    """The server did not start, or died."""


class Server:
    """A running server process.

    Attributes:
        key: sent with every request if it is set.
    """

    key: str | None = None

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        # on this machine: no proxy, and no certificates to load
        self._http = httpx.Client(base_url=self.url, limits=ONE_EACH, trust_env=False, verify=False)

    @property
    def url(self) -> str:
        """Base address."""
        return f"http://127.0.0.1:{self.port}"

    def post(
        self, path: str, body: Mapping[str, Any], timeout_s: float = 600.0, method: str = "POST"
    ) -> Any:
        """POST JSON (or PUT, DELETE) and return the decoded answer.

        Raises:
            httpx.HTTPStatusError: the server refuses; with what it says of it.
            httpx.HTTPError: it cannot be reached, or does not answer in time.
        """
        text = self._ask(method, path, timeout_s, json=body)
        return json.loads(text) if text.startswith(("{", "[")) else text

    def get(self, path: str, timeout_s: float = 120.0) -> str:
        """GET and return the text; raises what ``post`` raises."""
        return self._ask("GET", path, timeout_s)

    def _ask(self, method: str, path: str, timeout_s: float, **body: Any) -> str:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return _text(self._http.request(method, path, headers=headers, timeout=timeout_s, **body))

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def healthy(self, timeout_s: float = 30.0) -> bool:
        """Whether the server answers its health check in time."""
        return self._answers("/health", timeout_s)

    def ready(self) -> bool:
        """Whether the server takes requests. The engine says so at once; a check of its health
        takes a second, whatever it finds."""
        return self._answers("/ready", 30.0)

    def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            self.get(path, timeout_s)
        except httpx.HTTPError:
            return False
        return True

    def stop(self) -> int:
        """Stop the server's process group and wait; returns the exit status."""
        if self.is_alive():
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.kill()
        return status

    def kill(self) -> None:
        """End the server's process group without a chance to do anything, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return self._last(lines, "")

    def complaints(self, lines: int = 8) -> str:
        """The last lines of the log that tell of trouble."""
        return self._last(lines, _TROUBLE)

    def _last(self, lines: int, pattern: str) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        found = [line[:_MOST_OF_A_LINE] for line in text if re.search(pattern, line)]
        return "\n".join(found[-lines:])


def _text(answer: httpx.Response) -> str:
    if not answer.is_success:
        told = f"{answer.status_code} for {answer.url}: {answer.text[:_MOST_OF_A_LINE]}"
        raise httpx.HTTPStatusError(told, request=answer.request, response=answer)
    return answer.text


def start(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Server:
    """Start ``sglang.launch_server`` without waiting for it.

    Args:
        arguments: engine options, without host and port.
        log: file for its output.
        environment: variables on top of those that are ``inherited``.
        port: TCP port, a free one if None.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**inherited(), **(environment or {})},
            # a group of its own, so that the scheduler and the detokenizer end with it
            start_new_session=True,
        )
    return Server(process, port, log)


def wait_until_ready(server: Server, timeout_s: float = 600.0) -> None:
    """Block until the server takes requests.

    Raises:
        ServerError: it exited or did not start in time; with the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while not server.ready():
        if not server.is_alive():
            raise ServerError(f"server exited with {server.process.poll()}:\n{server.tail()}")
        if time.monotonic() > deadline:
            server.stop()
            raise ServerError(f"server not ready after {timeout_s:.0f} s:\n{server.tail()}")
        time.sleep(0.05)


@contextlib.contextmanager
def explained_by(server: Server) -> Iterator[None]:
    """What goes wrong in a with-block also tells what the server complained of."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{server.log.name}, complaints:\n{server.complaints()}")
        raise


@contextlib.contextmanager
def running(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A healthy server for the length of a with-block."""
    server = start(arguments, log, environment)
    try:
        wait_until_ready(server)
        with explained_by(server):
            yield server
    finally:
        server.stop()
