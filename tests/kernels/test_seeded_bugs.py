"""The test of the tests for copies: each bug seeded here must be found by the comparison."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sglang_ext.kernels import check, cpu
from sglang_ext.kernels.plane import Pages, Plane, Strides

Change = Callable[[Strides], dict[str, Any]]
CASES = [
    check.Case(layout, 16, 8, 5, torch.float32)
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
]


def found(make: Callable[[Sequence[Sequence[Plane]]], Any]) -> list[str]:
    return [line for case in CASES for line in check.differences(case, torch.device("cpu"), make)]


CHANGES: dict[str, Change] = {
    "tokens are one chunk that do not lie together": lambda s: {
        "tokens": 1,
        "chunk": s.chunk * s.tokens,
    },
    "the last token is left out": lambda s: {"tokens": max(1, s.tokens - 1)},
    "a head begins where the one before does": lambda s: {"host_head": 0},
    "every layer is the first one": lambda s: {"host_layer": 0},
    "runs of pages are one copy in every layout": lambda s: {"merges": True},
    "a byte more than the chunk": lambda s: {"chunk": s.chunk + 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_wrong_strides_are_found(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Strides.of
    monkeypatch.setattr(
        Strides, "of", lambda plane: dataclasses.replace(right(plane), **change(right(plane)))
    )
    assert found(cpu.CpuPageCopier)


def test_layers_that_are_counted_from_the_first_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: Any, host: Pages, device: Pages, layers: range, *, to_host: bool) -> None:
        right(self, host, device, range(len(layers)), to_host=to_host)

    right = cpu._BoundPlane.copy
    monkeypatch.setattr(cpu._BoundPlane, "copy", copy)
    assert found(cpu.CpuPageCopier)


def test_a_thread_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(components: Sequence[Sequence[Plane]]) -> cpu.CpuPageCopier:
        copier = cpu.CpuPageCopier(components, threads=2)
        monkeypatch.setattr(copier._others, "submit", lambda *_, **__: _Done())
        return copier

    class _Done:
        def result(self) -> None:
            pass

    assert found(make)
