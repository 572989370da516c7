"""What the bench for a GPU holds to be shown: bounds, exit status, and parts that fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.bench.gpu import __main__ as bench
from launch.bench.gpu import checks, copies, exact, part, served, setting, steps
from launch.bench.gpu.checks import Check
from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import Setting
from launch.bench.pairs import OURS_HOST, STOCK, STOCK_HOST
from sglang_ext.kernels.page_copy.cpu import CpuPageCopier
from tests.conftest import ROOT
from tests.launch import failing_parts

CPU = torch.device("cpu")


def verdicts(found: list[Check], device: str = "cuda") -> dict[str, str]:
    """What is said of each claim."""
    return {row["what"]: row["verdict"] for row in checks.judged(found, device)}


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        (0.9, True, "held"),
        (0.89, True, "MISSED"),
        (0.9, False, "held"),
        (0.91, False, "MISSED"),
        (None, True, "NOT MEASURED"),
        (float("nan"), False, "MISSED"),
    ],
)
def test_a_bound_is_the_last_value_that_holds(
    value: float | None, at_least: bool, verdict: str
) -> None:
    found = checks.judged([Check("x", value, 0.9, at_least=at_least)], "cuda")
    assert found[0]["verdict"] == verdict
    assert found[0]["bound"] == (">= 0.9" if at_least else "<= 0.9")
    assert checks.passes(found) == (verdict == "held")
    assert checks.lines(found)[0].startswith(verdict)


def test_speed_is_not_judged_without_a_gpu_and_what_judges_nothing_does_not_pass() -> None:
    slow = Check("slow", 9.0, 1.0, timed=True)
    right = Check("right", 0.0, 0.0)
    assert verdicts([slow], "cuda") == {"slow": "MISSED"}
    assert verdicts([slow], "cpu") == {"slow": "not judged"}
    assert checks.passes(checks.judged([slow, right], "cpu"))
    assert not checks.passes(checks.judged([slow, right], "cuda"))
    assert not checks.passes(checks.judged([slow], "cpu"))
    assert not checks.passes([])


def of_cells(**cells: dict[str, Any]) -> dict[str, str]:
    """Verdicts of ``exact`` on such cells."""
    return verdicts(exact.checks({"cells": cells}))


def test_every_cell_has_to_be_equal() -> None:
    said = of_cells(
        same={"verdict": "equal", "different": 0},
        noise={"verdict": "rounding", "different": 3},
        other={"verdict": "different", "different": 1},
        empty={"verdict": "nothing came from the host", "different": 0},
        dead={"verdict": "failed", "failed": "x"},
    )
    assert list(said.values()) == ["held", "held", "MISSED", "NOT MEASURED", "NOT MEASURED"]
    assert list(of_cells().values()) == ["NOT MEASURED"]


def of_loads(throughput: float, ttft: float, device_only: float, no_reuse: float) -> dict[str, Any]:
    """A report of ``served`` with these ratios of ours."""
    reuse = {
        "ours_to": {
            STOCK_HOST: {served.THROUGHPUT: throughput, served.TTFT: ttft},
            STOCK: {served.THROUGHPUT: device_only},
        },
        "median": {OURS_HOST: {"hit_rate_host": 0.5}},
    }
    loads = {
        served.REUSE: reuse,
        served.NO_REUSE: {"ours_to": {STOCK: {served.THROUGHPUT: no_reuse}}},
    }
    return {"loads": loads, "host_bytes": {OURS_HOST: 1000.0, STOCK_HOST: 1000.0}}


def test_the_bounds_of_a_load() -> None:
    assert set(verdicts(served.checks(of_loads(1.5, 0.6, 1.8, 0.99))).values()) == {"held"}
    missed = verdicts(served.checks(of_loads(1.49, 0.61, 1.79, 0.98)))
    assert list(missed.values()) == ["MISSED"] * 4 + ["held"] * 2


def test_a_host_that_is_larger_than_stocks_or_not_read_shows_nothing() -> None:
    report = of_loads(1.5, 0.6, 1.8, 0.99)
    report["host_bytes"][OURS_HOST] = 1010.0
    report["loads"][served.REUSE]["median"][OURS_HOST]["hit_rate_host"] = 0.0
    assert list(verdicts(served.checks(report)).values()) == ["held"] * 4 + ["MISSED"] * 2
    assert set(verdicts(served.checks({})).values()) == {"NOT MEASURED"}


def row(copy: str, programs: int | None, way: str, **figures: float) -> dict[str, Any]:
    """Of ``steps``."""
    figures = {"alone_gb_per_s": 50.0, "step_p99_ratio": 1.0, "wrong_rows": 0, **figures}
    return {"copy": copy, "programs": programs, "way": way, **figures}


def of_copies(speed: float = 45.0, step: float = 1.05, itl: float = 1.05, **rows: Any) -> Any:
    """A report of ``copies``."""
    ways = ("to_host", "to_device")
    phases = {
        "host": {"host": 100, "itl_s": {"p99": itl}},
        "device": {"itl_s": {"p99": 1.0}},
        "new": {"itl_s": {"p99": 2 * itl}},
    }
    ours = {"alone_gb_per_s": speed, "step_p99_ratio": step, **rows}
    return {
        "steps": {
            "default_programs": 32,
            "rows": [
                *(row(steps.PLAIN, None, way) for way in ways),
                *(row("ours, page_first", 32, way, **ours) for way in ways),
                # neither judged: not what servers use, and does not load
                row("ours, page_first", 1, "to_host", alone_gb_per_s=1.0, step_p99_ratio=9.0),
                {"copy": "engine's direct", "failed": "x"},
            ],
        },
        "requests": {
            copies.KERNEL: phases,
            STOCK: {"new": {"itl_s": {"p99": 2.0}}},
            STOCK_HOST: {},
        },
    }


def test_the_bounds_of_copies() -> None:
    said = verdicts(copies.checks(of_copies()))
    assert set(said.values()) == {"held"}
    assert len(said) == 1 + 4 + 3
    said = verdicts(copies.checks(of_copies(speed=44.9, step=1.06, itl=1.06)))
    assert [what for what, verdict in said.items() if verdict == "held"] == [
        "rows that 3 ways to copy got wrong, there and back",
        f"{copies.KERNEL}: tokens from the host",
    ]
    assert "MISSED" in verdicts(copies.checks(of_copies(wrong_rows=1))).values()
    assert set(verdicts(copies.checks({})).values()) == {"NOT MEASURED"}


class LosesARow(CpuPageCopier):
    """The last page of a copy stays behind."""

    def prepare(self, pairs: Any) -> Any:
        return super().prepare([(host[:-1], device[:-1]) for host, device in pairs])


class OneTooMany(CpuPageCopier):
    """A page that nobody asked for takes the place of another on the host, and comes back."""

    def prepare(self, pairs: Any) -> Any:
        (host, device) = pairs[0]
        other = np.setdiff1d(np.arange(2 * len(device)), device)[:1]
        return super().prepare([(np.append(host, host[0]), np.append(device, other))])


@pytest.mark.parametrize(("copier", "pages"), [(CpuPageCopier, 0), (LosesARow, 1), (OneTooMany, 2)])
def test_a_copy_that_loses_a_row_is_seen(
    copier: type[CpuPageCopier], pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        steps, "_copier", lambda _, components, threads: copier(components, threads)
    )
    copying = next(steps.sources(steps.SMALL, CPU)[steps.OURS]())
    # K and V of each layer
    assert copying.wrong_rows() == pages * 64 * 2 * 12


def test_the_plain_copy_is_compared_too() -> None:
    copying = next(steps.sources(steps.SMALL, CPU)[steps.PLAIN]())
    assert copying.wrong_rows() == 0
    assert copying.ways.keys() == {"to_host", "to_device"}
    nothing = {way: lambda: None for way in copying.ways}
    lost = steps.dataclasses.replace(copying, ways=nothing)
    assert lost.wrong_rows() == len(copying.rows) * len(copying.layers)


def test_the_engines_kernel_is_compiled_for_other_numbers_of_programs() -> None:
    from sglang.kernels.ops.kvcache import hicache

    def numbers() -> tuple[int, int]:
        return hicache.TMA_BLOCK_QUOTA, hicache.DEFAULT_BLOCK_QUOTA

    default = numbers()
    with steps.engines_programs(16):
        assert numbers() == (16, 16)
    with steps.engines_programs(None):
        assert numbers() == default
    assert numbers() == default
    counts = [2**n for n in range(7)]
    assert list(steps.LARGE.programs) == counts
    assert {*steps.LARGE.engines} <= {*counts}
    assert min(steps.LARGE.engines) == 1 and max(steps.LARGE.engines) == 64


def test_a_record_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    record = Record(path)
    record.put({"verdict": "equal"}, "cells", "page 1")
    record.put({"verdict": "equal"}, "cells", "page 16")
    record.leave_out("page 64")
    assert json.loads(path.read_text()) == {
        "left_out": ["page 64"],
        "cells": {"page 1": {"verdict": "equal"}, "page 16": {"verdict": "equal"}},
    }


def setting_of(tmp_path: Path, limit_s: float = 600.0) -> Setting:
    """Of a part on a CPU."""
    (tmp_path / "part").mkdir(exist_ok=True)
    return Setting("cpu", small=True, logs=tmp_path / "part", limit_s=limit_s)


class Part:
    """Stands in for a part that has one cell."""

    def __init__(self, different: int, fails: bool = False) -> None:
        self._different, self._fails = different, fails

    def run(self, setting: Setting, record: Record) -> None:
        found = {"verdict": "equal" if not self._different else "different"}
        record.put({**found, "different": self._different}, "cells", "one")
        record.leave_out("two")
        if self._fails:
            raise RuntimeError("the card fell off the bus")

    def checks(self, report: dict[str, Any]) -> list[Check]:
        return exact.checks(report)

    def table(self, report: dict[str, Any]) -> list[str]:
        return [*report["cells"]]


@pytest.mark.parametrize(
    ("stand_in", "ok"), [(Part(0), True), (Part(1), False), (Part(0, fails=True), False)]
)
def test_a_part_reports_what_it_has(
    stand_in: Part,
    ok: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(part.PARTS, "exact", stand_in)
    setting = setting_of(tmp_path)
    part.work("exact", setting)
    found = json.loads(setting.report.read_text())
    assert found["ok"] == ok
    assert "one" in found["cells"]
    said = capsys.readouterr().out
    assert "left out for want of time: two" in said
    assert ("MISSED" in said) == (found["cells"]["one"]["different"] > 0)
    assert ("fell off the bus" in found.get("failed", "")) == stand_in._fails


def wait_for_end(pid: int) -> None:
    """Until the process is gone, or is one that nobody has waited for. A kill takes effect when the
    process runs next."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a stand-in for a part as the bench does: what is reported of it."""
    monkeypatch.setattr(bench, "GRACE_S", 0.0)

    def run(work: Callable[..., None]) -> dict[str, Any]:
        monkeypatch.setattr(part, "work", work)
        report = bench.Report(tmp_path / "report.json", {"card": "none"})
        setting = setting_of(tmp_path)
        found = bench.run_part("exact", setting, report)
        assert json.loads((tmp_path / "report.json").read_text())["parts"]["exact"] == found
        if setting.processes.exists():
            wait_for_end(int(setting.processes.read_text()))
        return found

    return run


def test_a_part_that_dies_leaves_what_it_had_measured(ran: Callable[..., Any]) -> None:
    found = ran(failing_parts.measures_and_dies)
    assert not found["ok"]
    assert found["failed"] == f"its process ended with status {-signal.SIGSEGV}"
    assert found["cells"] == {"one": {"verdict": "equal", "different": 0}}
    assert [row["verdict"] for row in found["checks"]] == ["held"]


def test_a_part_that_hangs_is_ended(
    ran: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_s(setting: Setting) -> float:
        # a file that is there may have nothing in it yet
        has_begun = setting.processes.exists() and setting.processes.read_text()
        return -1.0 if has_begun else 600.0

    monkeypatch.setattr(Setting, "left_s", left_s)
    found = ran(failing_parts.measures_and_hangs)
    assert not found["ok"]
    assert found["failed"].startswith("ended after ")
    assert found["cells"] == {"one": {"verdict": "equal", "different": 0}}


def test_the_exit_status_is_that_of_the_worst_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = {"exact": False, "served": True, "copies": True}

    def run_part(name: str, setting: Setting, report: bench.Report) -> dict[str, Any]:
        # before any part, or all servers of it would do it at once
        assert report.data["compiling_s"] == 7.0
        return report.take(name, setting, seconds=1.0, ok=outcome[name])

    monkeypatch.setattr(bench, "run_part", run_part)
    monkeypatch.setattr(bench, "compile_loops", lambda: 7.0)
    options = ["--device", "cpu", "--logs", str(tmp_path), "--out", str(tmp_path / "x.json")]
    assert bench.main(options) == 1
    written = json.loads((tmp_path / "x.json").read_text())
    assert {name: found["ok"] for name, found in written["parts"].items()} == outcome
    assert written["small"] and written["sgl_kernel"] == "none"
    assert {"sglang", "torch", "triton", "cuda"} <= written["versions"].keys()
    assert bench.main([*options, "--only", "served", "copies"]) == 0
    assert "== exact: NOT OK" in capsys.readouterr().out


def test_of_a_log_the_line_counts_that_names_an_error() -> None:
    log = "Traceback\nModuleNotFoundError: No module named 'x'\n\nkill_process_tree called"
    assert setting.reason(log) == "ModuleNotFoundError: No module named 'x'"
    assert setting.reason("no answer\nfor 150 s") == "for 150 s"
    assert setting.reason("") == ""


def test_what_is_compiled_first_is_what_servers_would_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The modules that ask for it, wherever they are."""
    ran: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(setting.subprocess, "run", lambda command, **_: ran.append(command[-1]))
        assert setting.compile_loops() >= 0
    code = f"{ran[0]}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    package = ROOT / "sglang_ext"
    asks = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in package.rglob("*.py")
        if "@compiled(" in file.read_text()
    }
    assert len(asks) > 10
    assert asks <= loaded


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "launch.bench.gpu"]
    out = tmp_path / "x.json"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, env=hidden, check=False
    )
    assert run.returncode == 2
    assert run.stderr == "no GPU here: nothing was run (--device cpu runs at small size)\n"
    assert not out.exists()
