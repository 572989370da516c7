"""Whether transfers on CUDA keep their order beside a forward pass that is late.

The pass writes the pages of a backup after the backup was submitted, and reads what a load
replaces after the load was submitted; then it reads what the load brings, layer by layer. Each
comparison is also made with the order taken away, where it has to fail.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from sglang_ext.kernels.page_copy.gpu import GpuPageCopier
from sglang_ext.kernels.page_copy.reference import BOTH, Case, Memory
from sglang_ext.transfer import cuda
from sglang_ext.transfer.job import Job, Part
from sglang_ext.transfer.kernel_copies import KernelCopies

_LATE_CYCLES = 200_000_000
"""Of the GPU's clock, some 0.1 s: far longer than any submission takes."""
_CASE = Case("page_first", 16, (64, 32), torch.bfloat16)
_PARTS = tuple(Part(number, host, device) for number, (host, device) in enumerate(BOTH))


def faults() -> list[str]:
    """What is wrong with the order of transfers, or with this check; needs a GPU."""
    for run in _RUNS.values():
        run()  # what is used for the first time is loaded first, and that waits for the GPU
    found = [f"{name}: {fault}" for name, run in _RUNS.items() for fault in run()]
    for name, run in _RUNS.items():
        with _without(name):
            if not run():
                found.append(f"{name}: nothing is seen when the order is taken away")
    return found


def _engine() -> tuple[Memory, cuda.CudaTransferEngine, list[tuple[int, int]]]:
    """Memory, transfers on it, and (pool, layer of it) of all layers."""
    memory = Memory(_CASE, torch.device("cuda"))
    layers = [
        (pool, layer)
        for pool, planes in enumerate(memory.components)
        for layer in range(len(planes[0].layers))
    ]
    copies = KernelCopies(GpuPageCopier(memory.components), len(memory.components))
    return memory, cuda.CudaTransferEngine(copies, [[layer] for layer in layers]), layers


def _backup() -> list[str]:
    memory, engine, _ = _engine()
    with _late() as forward:
        for tensor in _on_device(memory):
            tensor.view(torch.uint8).bitwise_not_()
    engine.submit_backup(Job(range(1), _PARTS), forward)
    found = [] if engine.backed_up()[0] < 0 else ["reported before its pages were written"]
    engine.drain()
    torch.cuda.synchronize()
    if engine.backed_up()[0] != 0:
        found.append("not reported")
    if not _is_equal(memory):
        found.append("the host has other bytes than the forward pass wrote")
    return found


def _load() -> list[str]:
    memory, engine, _ = _engine()
    former = [tensor.clone() for tensor in _on_device(memory)]
    torch.cuda.synchronize()
    with _late() as forward:
        read = [tensor.clone() for tensor in _on_device(memory)]
    gate = engine.submit_load(Job(range(1), _PARTS), forward)
    found = []
    if gate.is_open() or engine.loaded() >= 0:
        found.append("reported before the forward pass had read what was there")
    engine.drain()
    torch.cuda.synchronize()
    if engine.loaded() != 0 or not gate.is_open():
        found.append("not reported")
    if not all(map(_same, read, former)):
        found.append("replaced pages that the forward pass had yet to read")
    if not _is_equal(memory):
        found.append("the device has other bytes than the host")
    return found


def _gates() -> list[str]:
    memory, engine, layers = _engine()
    with _late() as late:
        pass
    # behind the late stream: every layer arrives long after its reader was submitted
    gate = engine.submit_load(Job(range(1), _PARTS), late)
    read = []
    with torch.cuda.stream(_stream()):
        for number, (component, local) in enumerate(layers):
            gate.wait(number)
            read += [plane.layers[local].clone() for plane in memory.components[component]]
    engine.drain()
    torch.cuda.synchronize()
    wanted = [
        plane.layers[local] for component, local in layers
        for plane in memory.components[component]
    ]  # fmt: skip
    return [] if all(map(_same, read, wanted)) else ["a reader was ahead of its layer"]


_RUNS = {"backup": _backup, "load": _load, "gate": _gates}


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Take away what orders a run."""
    target, method = (cuda, "_order_behind") if name != "gate" else (cuda.EventLayerGate, "wait")
    with mock.patch.object(target, method, return_value=None):
        yield


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _late() -> Iterator[torch.cuda.Stream]:
    """A current stream on which everything comes late."""
    stream = _stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_LATE_CYCLES)  # type: ignore[no-untyped-call]
        yield stream


def _on_device(memory: Memory) -> list[torch.Tensor]:
    return [layer for planes in memory.components for plane in planes for layer in plane.layers]


def _is_equal(memory: Memory) -> bool:
    """Whether both sides of every pair hold the same bytes."""
    for (host, device), planes in zip(BOTH, memory.components, strict=True):
        for plane in planes:
            for number, layer in enumerate(plane.layers):
                by_page = layer.view(-1, plane.page_tokens, *layer.shape[1:]).cpu()
                if not _same(plane.host[host, :, number], by_page[device]):
                    return False
    return True


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*as_bytes)
