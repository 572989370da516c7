"""Where a part of the bench runs, and its servers."""

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.bench import machine
from launch.server import CPU, Server, ServerError, start, wait_until_ready

ROOT = Path(__file__).resolve().parents[3]
START_S = {"cuda": 120.0, "cpu": math.inf}
"""Servers that do not answer by then are given up. On a CPU, where it is enough that they run, a
part's limit is the only one."""
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A server to start: what it has beside the options and variables that all have."""

    options: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Setting:
    """Device, sizes and time of a part.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: sizes for a CPU.
        logs: folder for the servers' output.
        report: the part's, while it runs.
        processes: file with the process groups of its servers.
        has_sgl_kernel: whether servers on a GPU have the engine's copies that come compiled.
    """

    def __init__(self, device: str, *, small: bool, logs: Path, limit_s: float) -> None:
        self.device, self.small, self.logs = device, small, logs
        self.report, self.processes = logs / "report.json", logs / "servers.txt"
        self.has_sgl_kernel = False
        self._end = time.monotonic() + limit_s

    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def environment(self) -> dict[str, str]:
        """Variables of a server with the engine's Triton attention."""
        variables = {**CPU, "EXT_CPU_DEVICE": self.device, "EXT_CPU_ATTENTION": "triton"}
        if self.device == "cpu":
            variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return variables

    def up(
        self, stack: contextlib.ExitStack, wanted: Mapping[str, Wanted], common: Sequence[str]
    ) -> tuple[dict[str, Server], dict[str, str]]:
        """Start servers side by side; ``stack`` ends them.

        Returns:
            Those that answer, and of the others how their logs end, by name.
        """
        started = {}
        for name, each in wanted.items():
            log = self.logs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
            options = ["--attention-backend", "triton", *common, *each.options]
            started[name] = start(options, log, {**self.environment(), **each.environment})
            with self.processes.open("a") as file:
                file.write(f"{started[name].process.pid}\n")
            # nothing of it is needed any more when a part ends
            stack.callback(started[name].kill)
        failed, until = {}, time.monotonic() + min(START_S[self.device], self.left_s())
        for name, server in started.items():
            try:
                wait_until_ready(server, max(1.0, until - time.monotonic()))
            except ServerError as error:
                failed[name] = str(error)[-2000:]
        return {n: server for n, server in started.items() if n not in failed}, failed


def reason(text: str) -> str:
    """The line of a log's end that says most: the last that names an error, or else the last."""
    lines = text.splitlines() or [""]
    return next((line for line in reversed(lines) if re.search(r"Error\b", line)), lines[-1])


def end_servers(setting: Setting) -> None:
    """End the servers of a part whose process has ended before it could."""
    there = setting.processes.exists()
    for number in setting.processes.read_text().split() if there else []:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(number), signal.SIGKILL)


def has_graphs(server: Server) -> bool:
    """Whether decode steps of a server are CUDA graphs."""
    return "decode CUDA graph end" in server.log.read_text(errors="replace")


@contextlib.contextmanager
def waking(server: Server) -> Any:
    """Let a stopped server run for the length of a with-block."""
    os.killpg(server.process.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGSTOP)


def compile_loops() -> float:
    """Have the loops of the cache's core compiled and kept on disk before there are servers: each
    would do it at once, for minutes. The seconds it took."""
    began = time.monotonic()
    loops = "import sglang_ext.core.cache, sglang_ext.core.retention.retention"
    loops += ", sglang_ext.core.compiled.scans, sglang_ext.kernels.page_copy.cpu"
    subprocess.run([sys.executable, "-W", "ignore", "-c", loops], cwd=ROOT, check=True)
    return time.monotonic() - began


def facts(device: str, commit: str | None) -> dict[str, Any]:
    """What the figures of a report are of: versions, machine, card, commit."""
    import torch
    import triton

    found = machine.facts()
    found["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none"}
    found["commit"] = commit or _commit()
    found["card"] = _card(torch) if device == "cuda" else "none"
    return found


def sgl_kernel_state(device: str) -> str:
    """Whether the engine's copies that come compiled can be had: ``loads``, or why not."""
    folder = os.environ.get("EXT_CPU_SGL_KERNEL")
    if device != "cuda" or folder is None:
        return "none"
    # a library that does not go with this PyTorch may end the process
    code = "import sys, torch; torch.ops.load_library(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", code, f"{folder}/common_ops.abi3.so"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return "loads"
    said = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
    return f"does not load: {said[-1]:.200}"


def _card(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "driver": _said(query),
    }


def _commit() -> str:
    """Of the code that runs, with a mark if it is not the commit's."""
    head = _said(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _said(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}, changed" if head != UNKNOWN and changed not in ("", UNKNOWN) else head


def _said(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
