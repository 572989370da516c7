"""What copies cost a decode step beside them, and the step costs copies, without a server.

The step is the matrix products of a model as large as that of ``served``, as a CUDA graph, over and
over. Pages are copied all the time, by our kernel with 1 to 64 programs, by the engine's io
backends, and by a plain copy. The engine's kernels have a number of programs that is compiled
into them, so they run with their own.
"""

import dataclasses
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from launch.bench.multiturn import distribution
from sglang_ext.kernels.page_copy.plane import Copier, Plane, host_by_page, host_shape

_LAYERS, _HEADS, _WIDTH, _PAGE = 12, 8, 64, 64
_SECONDS = 0.4
"""Of one measurement."""
_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Size:
    """Of pages and of the step.

    Attributes:
        pages: of a copy, for each of K and V.
        weights: (inputs, outputs) of the products of a layer.
        layers: of the step.
        programs: of our kernel; on a CPU, its threads.
    """

    pages: int
    weights: Sequence[tuple[int, int]]
    layers: int
    batch: int
    programs: Sequence[int]


LARGE = Size(
    64, ((2880, 5120), (4096, 2880), (2880, 23040), (11520, 2880)), 24, 8, (1, 2, 4, 8, 16, 32, 64)
)
SMALL = Size(4, ((64, 128), (128, 64)), 2, 2, (1, 2))


class Work:
    """A decode step, and copies beside it."""

    def __init__(self, size: Size, device: torch.device) -> None:
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._weights = [
            torch.randn(shape, device=device, dtype=kind) for shape in size.weights * size.layers
        ]
        self._inputs = {
            shape[0]: torch.randn(size.batch, shape[0], device=device, dtype=kind)
            for shape in size.weights
        }

    def step(self) -> None:
        """All products of one step."""
        for weight in self._weights:
            torch.mm(self._inputs[weight.shape[0]], weight)


class OnGpu:
    """Times of steps by events, beside copies on a stream of their own."""

    def __init__(self, work: Work) -> None:
        self._copies = torch.cuda.Stream()
        work.step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work.step()

    def steps(self) -> list[float]:
        """Seconds of steps by themselves."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self._graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def copying(self, copy: Callable[[], object]) -> float:
        """Seconds of one copy by itself."""
        with torch.cuda.stream(self._copies):
            copy()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(3):
                copy()
            end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 3e3

    def beside(self, copy: Callable[[], object], alone_s: float) -> tuple[list[float], float]:
        """(seconds of steps, seconds of one copy) beside each other."""
        count = max(2, int(_SECONDS / alone_s))
        with torch.cuda.stream(self._copies):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                copy()
            end.record()
        marks = [torch.cuda.Event(enable_timing=True)]
        marks[0].record()
        while not end.query():
            self._graph.replay()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            # not many ahead, or most of them would run behind the last copy
            marks[max(0, len(marks) - 3)].synchronize()
        torch.cuda.synchronize()
        during = [
            a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks) if b.elapsed_time(end) > 0
        ]
        return during, begin.elapsed_time(end) / 1e3 / count


class OnCpu:
    """The same by the clock, beside copies on a thread."""

    def __init__(self, work: Work) -> None:
        self._step = work.step

    def steps(self) -> list[float]:
        """See OnGpu."""
        return [_seconds(self._step) for _ in range(_STEPS)]

    def copying(self, copy: Callable[[], object]) -> float:
        """See OnGpu."""
        copy()
        return _seconds(copy)

    def beside(self, copy: Callable[[], object], alone_s: float) -> tuple[list[float], float]:
        """See OnGpu."""
        ended, copied = threading.Event(), list[float]()

        def all_the_time() -> None:
            while not ended.is_set():
                copied.append(_seconds(copy))

        thread = threading.Thread(target=all_the_time)
        thread.start()
        times = self.steps()
        ended.set()
        thread.join()
        return times, statistics.median(copied)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Pages:
    """K and V of some layers on the device and on the host, and random pages of a copy."""

    def __init__(self, layout: str, size: Size, device: torch.device) -> None:
        count = 2 * size.pages
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = host_shape(
            layout, layers=_LAYERS, pages=count, page_tokens=_PAGE, heads=_HEADS, width=_WIDTH
        )
        self.planes = []
        for _ in range(2):
            layers = tuple(
                torch.zeros(count * _PAGE, _HEADS, _WIDTH, dtype=kind, device=device)
                for _ in range(_LAYERS)
            )
            host = torch.zeros(shape, dtype=kind, pin_memory=device.type == "cuda")
            self.planes.append(Plane(layers, host_by_page(host, layout, _PAGE)))
        random = np.random.default_rng(0)
        self.chosen = [random.permutation(count)[: size.pages].astype(np.int64) for _ in range(2)]
        row = _HEADS * _WIDTH * kind.itemsize
        self.bytes = 2 * size.pages * _PAGE * _LAYERS * row


Copies = Iterator[tuple[str, int | None, int, dict[str, Callable[[], object]]]]
"""(name, programs, bytes of a copy, copy by its direction)."""


def _ours(size: Size, device: torch.device) -> Copies:
    layout = "page_first"
    pages = Pages(layout, size, device)
    for programs in size.programs:
        copier = _copier(device, [pages.planes], programs)
        job = copier.prepare([(pages.chosen[0], pages.chosen[1])])
        yield (
            f"ours, {layout}",
            programs,
            pages.bytes,
            {
                "to_host": partial(copier.copy_all, job, to_host=True),
                "to_device": partial(_by_layer, copier, job),
            },
        )


def _copier(device: torch.device, components: Sequence[Sequence[Plane]], programs: int) -> Copier:
    if device.type == "cuda":
        from sglang_ext.kernels.page_copy.gpu import GpuPageCopier

        return GpuPageCopier(components, programs)
    from sglang_ext.kernels.page_copy.cpu import CpuPageCopier

    return CpuPageCopier(components, programs)


def _by_layer(copier: Copier, job: Any) -> None:
    """As a load does it."""
    for layer in range(_LAYERS):
        copier.copy_layers(job, 0, range(layer, layer + 1), to_host=False)


def _plain(size: Size, device: torch.device) -> Copies:
    count = Pages("page_first", size, device).bytes
    there = torch.zeros(count, dtype=torch.uint8, device=device)
    here = torch.zeros(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copies = {
        "to_host": lambda: here.copy_(there, non_blocking=True),
        "to_device": lambda: there.copy_(here, non_blocking=True),
    }
    yield "plain copy", None, count, copies


BACKENDS = (("kernel", "page_first"), ("kernel", "layer_first"), ("direct", "page_first_direct"))


def _engines(size: Size, device: torch.device, backend: str, layout: str) -> Copies:
    """The engine's own, as its controller calls them."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls

    from sglang_ext_cpu import gpu_copies, host_copies

    (gpu_copies if device.type == "cuda" else host_copies).install()
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    count = 2 * size.pages * _PAGE
    pool = MHATokenToKVPool(
        count, _PAGE, kind, _HEADS, _WIDTH, _LAYERS, str(device), False, v_head_dim=_WIDTH
    )
    info = pool.get_device_pool_infos()[0].buffer_info
    host = get_mha_host_pool_cls(info)(
        info, 1.0, 0, _PAGE, layout, pin_memory=device.type == "cuda",
        device_capacity_tokens=pool.size, start_layer=0, end_layer=_LAYERS,
    )  # fmt: skip
    random = np.random.default_rng(0)
    where = "cpu" if backend == "direct" else str(device)
    on_host, on_device = (
        torch.from_numpy(
            (random.permutation(2 * size.pages)[: size.pages, None] * _PAGE + np.arange(_PAGE))
            .reshape(-1)
            .astype(np.int64)
        ).to(where)
        for _ in range(2)
    )
    row = _HEADS * _WIDTH * kind.itemsize

    def load() -> None:
        for layer in range(_LAYERS):
            host.load_to_device_per_layer(pool, on_host, on_device, layer, backend)

    yield (
        f"engine's {backend}, {layout}",
        None,
        2 * size.pages * _PAGE * _LAYERS * row,
        {
            "to_host": lambda: host.backup_from_device_all_layer(pool, on_host, on_device, backend),
            "to_device": load,
        },
    )


def measure(size: Size, device: torch.device) -> dict[str, Any]:
    """A step alone, and beside every copy both ways."""
    work = Work(size, device)
    machine: OnGpu | OnCpu = OnGpu(work) if device.type == "cuda" else OnCpu(work)
    machine.steps()
    alone = distribution(machine.steps())
    rows: list[dict[str, Any]] = []
    sources: dict[str, Callable[[], Copies]] = {
        "plain": partial(_plain, size, device),
        "ours": partial(_ours, size, device),
        **{
            f"engine's {backend}, {layout}": partial(_engines, size, device, backend, layout)
            for backend, layout in BACKENDS
        },
    }
    for source, copies in sources.items():
        try:
            for name, programs, count, ways in copies():
                for way, copy in ways.items():
                    copy_s = machine.copying(copy)
                    steps, beside_s = machine.beside(copy, copy_s)
                    rows.append(
                        {
                            "copy": name,
                            "programs": programs,
                            "way": way,
                            "alone_gb_per_s": count / copy_s / 1e9,
                            "beside_gb_per_s": count / beside_s / 1e9,
                            "step_s": distribution(steps),
                            "step_ratio": statistics.median(steps) / alone["p50"],
                        }
                    )
        except Exception as error:  # noqa: BLE001 - what does not load is part of the report
            rows.append({"copy": source, "failed": f"{error!r}"[:300]})
    return {"step_alone_s": alone, "rows": rows}
