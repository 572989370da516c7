"""The kernels do what the reference does, in every layout, and touch nothing else."""

import pytest
import torch

from sglang_ext.kernels.page_copy import reference
from sglang_ext.kernels.page_copy.cpu import CpuPageCopier
from sglang_ext.kernels.page_copy.plane import LAYOUTS, Plane, Strides, host_by_page, host_shape
from sglang_ext.tools import gpu_check
from tests.conftest import engine_child

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_cpu_kernel_is_the_reference(threads: int) -> None:
    def make(components: list[list[Plane]]) -> CpuPageCopier:
        return CpuPageCopier(components, threads, smallest_part=1)

    cases = list(reference.cases())
    assert [line for case in cases for line in reference.differences(case, CPU, make)] == []
    assert len(cases) == 4 * 3 * 3 * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_component_has_any_number_of_planes_of_any_width(threads: int) -> None:
    def make(components: list[list[Plane]]) -> CpuPageCopier:
        assert [len(planes) for planes in components] == [5, 5]
        return CpuPageCopier(components, threads, smallest_part=1)

    cases = list(reference.many_planes())
    assert [line for case in cases for line in reference.differences(case, CPU, make)] == []
    assert len(cases) == 4 * 3


def test_the_gpu_kernel_is_the_reference_where_it_is_interpreted() -> None:
    lines = engine_child("tests.kernels.interpreted")
    assert lines[0] == "12 shapes, words of 1, 2, 4, 8 bytes: 0 copies differ"
    assert lines[-1].startswith("verdict: right, not timed"), lines


@pytest.mark.full
def test_the_gpu_kernel_is_the_reference_in_every_shape() -> None:
    lines = engine_child("sglang_ext", "gpu-check", "--interpret")
    assert lines[0] == "72 shapes, words of 1, 2, 4, 8 bytes: 0 copies differ"


def test_without_a_gpu_the_check_says_that_it_checked_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize(
    "architectures", [("90",), pytest.param(("80", "100"), marks=pytest.mark.full)], ids=" ".join
)
def test_the_gpu_kernel_compiles_for_every_gpu(architectures: tuple[str, ...]) -> None:
    lines = engine_child("tests.kernels.cubins", *architectures)
    assert len(lines) == len(architectures) * 4 * 2 * 2
    assert all(int(line.split()[-1]) > 1000 for line in lines), lines
    # neighbouring lanes on neighbouring words: otherwise the link to the host carries single words
    assert {line.split()[-2] for line in lines} == {"1"}, lines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_together_is_one_chunk(layout: str) -> None:
    strides = Strides.of(_plane(layout))
    row, page = 2 * 8 * 4, 4 * 2 * 8 * 4
    assert (
        strides.chunk
        == {
            "layer_first": page,
            "page_first": row,
            "page_first_direct": page,
            "page_head": 8 * 4,
        }[layout]
    )
    assert strides.merges == (layout == "layer_first")


def _plane(layout: str) -> Plane:
    layers, pages, page, heads, width = 3, 5, 4, 2, 8
    shape = host_shape(
        layout, layers=layers, pages=pages, page_tokens=page, heads=heads, width=width
    )
    device = tuple(torch.zeros(pages * page, heads, width) for _ in range(layers))
    return Plane(device, host_by_page(torch.zeros(shape), layout, page))
