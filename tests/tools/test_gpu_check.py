"""What ``gpu-check`` tells an operator; ``tests.kernels`` checks that every byte is right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_ext.kernels.page_copy import reference
from sglang_ext.tools import gpu_check
from sglang_ext.tools.gpu_check import Found, link_of


def verdict(wrong: int, found: dict[str, Any] | None) -> str:
    """Of a check that has come to its end."""
    return gpu_check.verdict(Found(wrong, figures=found))


def figures(*speeds: float, peak: float | None = 63.0) -> dict[str, Any]:
    """A plain copy of 50 GB/s both ways, and layouts as fast as said, with 32 programs."""
    rows = [{"copy": "plain copy", "programs": None, "to_host": 50.0, "to_device": 50.0}]
    rows += [{"programs": 32, "to_host": speed, "to_device": 50.0} for speed in speeds]
    return {"default_programs": 32, "gigabytes_per_s": rows, "link": {"peak_gb_per_s": peak}}


@pytest.mark.parametrize(
    ("generation", "width", "peak"),
    [("5", "16", 63.0), ("4", "16", 31.5), ("4", "8", 15.8), ("1", "16", 4.0)],
)
def test_the_peak_of_a_link(generation: str, width: str, peak: float) -> None:
    link = link_of(generation, width)
    assert link["link"] == f"PCIe {generation} x{width}"
    assert round(link["peak_gb_per_s"], 1) == peak


@pytest.mark.parametrize(("generation", "width"), [("", ""), ("[N/A]", "16"), ("5", "[N/A]")])
def test_a_link_that_is_not_named_has_no_peak(generation: str, width: str) -> None:
    assert link_of(generation, width) == {"link": "not known", "peak_gb_per_s": None}


def test_the_verdict_is_of_the_slowest_layout() -> None:
    said = verdict(0, figures(49.0, 45.0, 48.0))
    assert said.startswith("verdict: right and fast")
    assert "to host 0.90 of a plain copy" in said
    assert "0.71 of the link's 63.0 GB/s" in said
    assert "link" not in verdict(0, figures(45.0, peak=None))


def test_other_numbers_of_programs_are_not_judged() -> None:
    found = figures(45.0)
    found["gigabytes_per_s"].append({"programs": 1, "to_host": 2.0, "to_device": 2.0})
    assert "to host 0.90 of a plain copy" in verdict(0, found)


def test_what_is_slow_or_wrong_is_said() -> None:
    assert "SLOW" in verdict(0, figures(49.0, 30.0))
    assert verdict(2, None).startswith("verdict: WRONG, 2 faults")
    assert verdict(0, None) == "verdict: right, not timed"


def test_what_there_was_no_time_for_is_said() -> None:
    found = Found(left_out=["7 of 108 shapes", "page_head with 32 programs"], figures=figures(49.0))
    said = gpu_check.verdict(found)
    assert said.startswith("verdict: right and fast")
    assert said.endswith("; no time for 7 of 108 shapes, page_head with 32 programs")
    found.figures = figures()
    assert gpu_check.verdict(found).startswith("verdict: right, not timed; no time for 7")


Ran = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ran:
    """The check as on a machine with a GPU, of which only the clock is true: (status, lines)."""

    def run(*options: str, shape_s: float = 0.1, wrong: int = 0) -> tuple[int, list[str]]:
        now = [0.0]

        def compare(case: reference.Case, *_: Any) -> list[str]:
            now[0] += shape_s
            return [str(case)] if now[0] <= wrong * shape_s + 1e-9 else []

        def timed(*_: Any) -> dict[str, Any]:
            return figures(49.0)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(gpu_check, "_check_order", lambda: 0)
        monkeypatch.setattr(gpu_check, "_time", timed)
        monkeypatch.setattr(reference, "differences", compare)
        return gpu_check.main(options), capsys.readouterr().out.splitlines()

    return run


def test_the_last_line_is_the_verdict_and_the_record_has_it(on_a_gpu: Ran, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    status, lines = on_a_gpu("--out", str(out))
    assert status == 0
    assert lines[0].startswith("108 shapes")
    assert lines[-1].startswith("verdict: right and fast")
    assert json.loads(out.read_text())["verdict"] == lines[-1].rpartition(" (")[0]


def test_it_ends_within_a_minute_whatever_a_shape_takes(on_a_gpu: Ran) -> None:
    status, lines = on_a_gpu(shape_s=2.0)
    assert status == 0
    assert lines[0].startswith("18 shapes")
    assert "no time for 90 of 108 shapes" in lines[-1]
    assert float(lines[-1].rpartition("(")[2].removesuffix(" s)")) < 60


def test_a_copy_that_differs_is_the_verdict_and_nothing_is_timed(on_a_gpu: Ran) -> None:
    status, lines = on_a_gpu(wrong=2)
    assert status == 1
    assert [line for line in lines if line.startswith("DIFFERENT")] == lines[:2]
    assert lines[-1].startswith("verdict: WRONG, 2 faults; do not use")


def test_a_kernel_that_does_not_run_is_a_verdict_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "_check_order", fails)
    assert gpu_check.main([]) == 1
    said = capsys.readouterr().out
    assert said.startswith("verdict: FAILED, RuntimeError('CUDA error: an illegal memory access")
    assert said.count("\n") == 1
