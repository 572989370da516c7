"""The test of the tests for copies: each bug seeded here must be found by the comparison."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sglang_ext.kernels.page_copy import cpu, reference
from sglang_ext.kernels.page_copy.plane import Pages, Plane, Strides

Change = Callable[[Strides], dict[str, Any]]
CASES = [
    reference.Case(layout, 16, (8, 5), torch.float32)
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
]


def found(make: Callable[[Sequence[Sequence[Plane]]], Any]) -> list[str]:
    return [
        line for case in CASES for line in reference.differences(case, torch.device("cpu"), make)
    ]


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


@pytest.mark.parametrize("side", ["host", "device"])
def test_runs_of_one_side_alone_are_found(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loop, were it to look at one side only."""

    def copy(
        strides: Any, host: Any, layers: Any, host_pages: Any, device_pages: Any, *rest: Any
    ) -> None:
        shown = host_pages if side == "host" else device_pages
        follows = np.flatnonzero(np.diff(shown) == 1) + 1
        host_pages, device_pages = host_pages.copy(), device_pages.copy()
        for i in follows:
            host_pages[i], device_pages[i] = host_pages[i - 1] + 1, device_pages[i - 1] + 1
        right(strides, host, layers, host_pages, device_pages, *rest)

    right = cpu.copy_pages
    monkeypatch.setattr(cpu, "copy_pages", copy)
    assert found(cpu.CpuPageCopier)


def test_a_thread_that_takes_parts_and_does_nothing_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def submit(work: Callable[[], None]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(cpu._BoundPlane, "copy", lambda *_, **__: None)
            work()
        return _Done()

    def make(components: Sequence[Sequence[Plane]]) -> cpu.CpuPageCopier:
        copier = cpu.CpuPageCopier(components, threads=2, smallest_part=1)
        monkeypatch.setattr(copier._others, "submit", submit)
        return copier

    assert found(make)


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_does_not_wait_for_its_threads_is_found(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, compared = threading.Event(), threading.Event()

    def copy(self: Any, *args: Any, **options: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            assert late.wait(120), "the other thread has a part"
        else:
            late.set()
            # who waits for it gets its rows late; who does not compares without them
            compared.wait(0.05 if waits else 120)
        right(self, *args, **options)

    def make(components: Sequence[Sequence[Plane]]) -> cpu.CpuPageCopier:
        late.clear()
        copier = cpu.CpuPageCopier(components, threads=2, smallest_part=1)
        submit = copier._others.submit  # type: ignore[union-attr]
        if not waits:
            monkeypatch.setattr(copier._others, "submit", lambda work: submit(work) and _Done())
        return copier

    right = cpu._BoundPlane.copy
    monkeypatch.setattr(cpu._BoundPlane, "copy", copy)
    try:
        differences = reference.differences(CASES[0], torch.device("cpu"), make)
    finally:
        compared.set()
    assert bool(differences) != waits


class _Done:
    """A future that is not waited for."""

    def cancel(self) -> bool:
        return False

    def result(self) -> None:
        pass
