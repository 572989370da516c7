"""What ``gpu-check`` tells an operator; ``tests.kernels`` checks that every byte is right."""

from typing import Any

import pytest

from sglang_ext.tools.gpu_check import link_of, verdict


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
