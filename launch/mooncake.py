"""A Mooncake store on this machine, over TCP: one master, one process that lends its memory.

python -m launch.mooncake --memory-mb 1024

prints the options for as many servers as shall share it, and runs until it is interrupted.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.server import free_port
from sglang_ext.arguments import Parser, output_file, whole

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ROOT / ".venv" / "mooncake"
"""What ``mooncake_libraries.sh`` unpacked, if the machine does not have it."""
_START_S = 180.0


def environment() -> dict[str, str]:
    """Variables with which a process finds Mooncake's libraries."""
    paths = [str(LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")]
    # glog would write each request into the server's log
    return {"LD_LIBRARY_PATH": ":".join(filter(None, paths)), "GLOG_minloglevel": "2"}


class MooncakeStore:
    """The processes of a store.

    Args:
        log: file for their output.
        memory_mb: for pages.
        lease_s: so long what was read stays; None for Mooncake's default.
    """

    def __init__(self, log: Path, memory_mb: int = 512, lease_s: int | None = None) -> None:
        self.port = free_port()
        self._metrics_port = free_port()
        self._log = log
        self._memory_mb = memory_mb
        self._lease_s = lease_s
        self._processes: list[subprocess.Popen[bytes]] = []

    def options(self, **more: object) -> list[str]:
        """Options of a server that uses the store and lends it no memory of its own; ``more``
        goes into the backend's settings."""
        settings = {
            "master_server_address": f"127.0.0.1:{self.port}",
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "protocol": "tcp",
            "device_name": "",
            "global_segment_size": 0,
            **more,
        }
        return [
            *("--hicache-storage-backend", "mooncake"),
            *("--hicache-storage-backend-extra-config", json.dumps(settings)),
        ]

    def start(self) -> None:
        """Start both processes and wait until pages can be stored.

        Raises:
            RuntimeError: they did not come up.
        """
        package = importlib.util.find_spec("mooncake")
        if package is None or not package.submodule_search_locations:
            raise RuntimeError(
                "mooncake is not installed: pip install -r launch/requirements/mooncake.txt"
            )
        master = Path(package.submodule_search_locations[0]) / "mooncake_master"
        options = ["--port", str(self.port), "--metrics_port", str(self._metrics_port)]
        if self._lease_s is not None:
            options += ["--default_kv_lease_ttl", str(1000 * self._lease_s)]
        self._run([str(master), *options])
        segment = [sys.executable, "-m", "launch.mooncake", "--lend", str(self.port)]
        self._run([*segment, "--memory-mb", str(self._memory_mb)])
        deadline = time.monotonic() + _START_S
        while "ready" not in self._log.read_text(errors="replace").splitlines():
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes):
                said = self._log.read_text(errors="replace")[-2000:]
                self.kill()  # and with it what it said
                raise RuntimeError(f"the store did not start:\n{said}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill both processes at once, as a crash would."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = []
        self._log.write_text("")

    def _run(self, command: list[str]) -> None:
        with self._log.open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, **environment()},
                )
            )


@contextlib.contextmanager
def store_running(
    log: Path, memory_mb: int = 512, lease_s: int | None = None
) -> Iterator[MooncakeStore]:
    """A store for the length of a with-block; see ``MooncakeStore``."""
    log.write_text("")
    store = MooncakeStore(log, memory_mb, lease_s)
    store.start()
    try:
        yield store
    finally:
        store.kill()


def _lend(port: int, memory_mb: int) -> None:
    """Lend memory to the store whose master listens on ``port``, for ever."""
    from mooncake.store import MooncakeDistributedStore  # type: ignore[import-untyped]

    client = MooncakeDistributedStore()
    size = memory_mb << 20
    deadline = time.monotonic() + _START_S
    master = f"127.0.0.1:{port}"
    while client.setup("127.0.0.1", "P2PHANDSHAKE", size, 16 << 20, "tcp", "", master):
        if time.monotonic() > deadline:
            raise SystemExit("no master")
        time.sleep(0.2)
    print("\nready", flush=True)
    signal.pause()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--memory-mb", type=whole(1), default=1024)
    parser.add_argument("--lend", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=output_file, default=ROOT / "out" / "mooncake.log")
    return parser.parse_args(argv)


def main() -> None:
    """Run a store until it is interrupted."""
    args = parse_args()
    if args.lend is not None:
        _lend(args.lend, args.memory_mb)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with store_running(args.log, args.memory_mb) as store:
        quoted = [f"'{option}'" if "{" in option else option for option in store.options()]
        variables = " ".join(f"{name}={value}" for name, value in environment().items())
        print(f"start the servers with\n  {variables}\nand\n  {' '.join(quoted)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
