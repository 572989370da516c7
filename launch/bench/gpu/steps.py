"""What copies cost a decode step beside them, and the step costs copies, without a server.

The step is the matrix products of a model as large as that of ``served``, as a CUDA graph, over and
over. Pages are copied all the time, by our kernel with 1 to 64 programs, by the engine's io
backends, and by a plain copy. Before a copy is timed, random bytes go there and back with it, and
every row is compared.

The engine compiles its own kernel for a number of programs where it runs: first for its default,
then for others, as long as there is time. Those that come compiled have one number.
"""

import contextlib
import dataclasses
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from launch.bench.gpu.record import Record
from launch.bench.multiturn import distribution
from sglang_ext.kernels.page_copy.plane import Copier, Plane, host_by_page, host_shape

_LAYERS, _HEADS, _WIDTH, _PAGE = 12, 8, 64, 64
_SECONDS = 0.4
"""Of one measurement."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of pages and of the step.

    Attributes:
        pages: of a copy, for each of K and V.
        weights: (inputs, outputs) of the products of a layer.
        layers: of the step.
        steps: of one measurement without copies.
        programs: of our kernel; on a CPU, its threads.
        engines: programs that the engine's kernel is compiled for beside its default.
    """

    pages: int
    weights: Sequence[tuple[int, int]]
    layers: int
    batch: int
    steps: int
    programs: Sequence[int]
    engines: Sequence[int]


LARGE = Size(
    pages=64,
    weights=((2880, 5120), (4096, 2880), (2880, 23040), (11520, 2880)),
    layers=24,
    batch=8,
    steps=400,
    programs=(1, 2, 4, 8, 16, 32, 64),
    engines=(1, 8, 16, 32, 64),
)
SMALL = Size(4, ((64, 128), (128, 64)), 2, 2, 50, (1, 2), ())


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

    def __init__(self, work: Work, count: int) -> None:
        self._count = count
        self._copies = torch.cuda.Stream()
        work.step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work.step()

    def steps(self) -> list[float]:
        """Seconds of steps by themselves."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self._count + 1)]
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

    def __init__(self, work: Work, count: int) -> None:
        self._step, self._count = work.step, count

    def steps(self) -> list[float]:
        """See OnGpu."""
        return [_seconds(self._step) for _ in range(self._count)]

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


@dataclasses.dataclass(frozen=True)
class Copying:
    """A way to copy pages.

    Attributes:
        programs: of its kernel; None where it has its own number, or none.
        count: bytes of a copy.
        ways: copy by its direction.
        layers: the device's side of K and V.
        rows: tokens that are copied, of each of those.
    """

    name: str
    programs: int | None
    count: int
    ways: Mapping[str, Callable[[], object]]
    layers: Sequence[torch.Tensor]
    rows: torch.Tensor

    def wrong_rows(self) -> int:
        """Rows that are not what they were after a copy there and back, and rows besides that
        are not what they were made meanwhile."""
        # of the memory itself: a copy of it would show nothing
        layers = [layer.view(torch.uint8).view(len(layer), -1) for layer in self.layers]
        before = []
        for layer in layers:
            layer.random_(0, 256)
            before.append(layer[self.rows])
        self._run("to_host")
        for layer in layers:
            layer.zero_()
        self._run("to_device")
        wrong = 0
        for layer, was in zip(layers, before, strict=True):
            expected = torch.zeros_like(layer)
            expected[self.rows] = was
            wrong += int((layer != expected).any(dim=1).sum())
        return wrong

    def _run(self, way: str) -> None:
        cuda = self.rows.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        self.ways[way]()
        if cuda:
            torch.cuda.synchronize()


def _rows(pages: np.ndarray, device: torch.device) -> torch.Tensor:
    """Tokens of pages."""
    return torch.from_numpy((pages[:, None] * _PAGE + np.arange(_PAGE)).reshape(-1)).to(device)


def _ours(size: Size, device: torch.device) -> Iterator[Copying]:
    layout = "page_first"
    pages = Pages(layout, size, device)
    for programs in size.programs:
        copier = _copier(device, [pages.planes], programs)
        job = copier.prepare([(pages.chosen[0], pages.chosen[1])])
        yield Copying(
            f"{OURS}, {layout}",
            programs,
            pages.bytes,
            {
                "to_host": partial(copier.copy_all, job, to_host=True),
                "to_device": partial(_by_layer, copier, job),
            },
            [layer for plane in pages.planes for layer in plane.layers],
            _rows(pages.chosen[1], device),
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


def _plain(size: Size, device: torch.device) -> Iterator[Copying]:
    row = 1024
    rows = Pages("page_first", size, device).bytes // row
    there = torch.zeros(rows, row, dtype=torch.uint8, device=device)
    here = torch.zeros(rows, row, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copies = {
        "to_host": lambda: here.copy_(there, non_blocking=True),
        "to_device": lambda: there.copy_(here, non_blocking=True),
    }
    yield Copying(PLAIN, None, rows * row, copies, [there], torch.arange(rows, device=device))


OURS, PLAIN = "ours", "plain copy"
BACKENDS = (("kernel", "page_first"), ("kernel", "layer_first"), ("direct", "page_first_direct"))


@contextlib.contextmanager
def engines_programs(count: int | None) -> Iterator[None]:
    """The engine's kernel is compiled for so many programs meanwhile; None leaves its default."""
    from sglang.kernels.ops.kvcache import hicache

    names = ("TMA_BLOCK_QUOTA", "DEFAULT_BLOCK_QUOTA")
    with contextlib.ExitStack() as stack:
        for name in names if count is not None else ():
            stack.enter_context(mock.patch.object(hicache, name, count))
        yield


def _engines(
    size: Size, device: torch.device, backend: str, layout: str, programs: int | None = None
) -> Iterator[Copying]:
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
    where = torch.device("cpu") if backend == "direct" else device
    on_host, on_device = (
        _rows(random.permutation(2 * size.pages)[: size.pages].astype(np.int64), where)
        for _ in range(2)
    )
    row = _HEADS * _WIDTH * kind.itemsize

    def load() -> None:
        for layer in range(_LAYERS):
            host.load_to_device_per_layer(pool, on_host, on_device, layer, backend)

    with engines_programs(programs):
        yield Copying(
            f"engine's {backend}, {layout}",
            programs,
            2 * size.pages * _PAGE * _LAYERS * row,
            {
                "to_host": lambda: host.backup_from_device_all_layer(
                    pool, on_host, on_device, backend
                ),
                "to_device": load,
            },
            [*pool.k_buffer, *pool.v_buffer],
            on_device.to(device),
        )


Sources = Mapping[str, Callable[[], Iterator[Copying]]]
"""Ways to copy by name, in the order in which they are measured."""


def sources(size: Size, device: torch.device) -> Sources:
    """A plain copy, ours with all numbers of programs, the engine's with their own."""
    return {
        PLAIN: partial(_plain, size, device),
        OURS: partial(_ours, size, device),
        **{
            f"engine's {backend}, {layout}": partial(_engines, size, device, backend, layout)
            for backend, layout in BACKENDS
        },
    }


def other_programs(size: Size, device: torch.device) -> Sources:
    """The engine's kernel with other numbers of programs; to compile one takes a while."""
    return {
        f"engine's kernel, {count} programs": partial(
            _engines, size, device, "kernel", "page_first", count
        )
        for count in size.engines
    }


def default_programs(size: Size, device: torch.device) -> int:
    """Of our kernel on a server; on a CPU the most that are measured."""
    if device.type == "cpu":
        return max(size.programs)
    from sglang_ext.kernels.page_copy.gpu import PROGRAMS

    return PROGRAMS


class Beside:
    """A step alone, and beside copies both ways; into ``steps`` of a record."""

    def __init__(self, size: Size, device: torch.device, record: Record) -> None:
        self._record = record
        work = Work(size, device)
        self._machine = (OnGpu if device.type == "cuda" else OnCpu)(work, size.steps)
        self._machine.steps()
        self._alone = distribution(self._machine.steps())
        self._rows: list[dict[str, Any]] = []
        record.put(self._alone, "steps", "step_alone_s")
        record.put(default_programs(size, device), "steps", "default_programs")

    def measure(self, ways: Sources, goes_on: Callable[[], bool]) -> None:
        """Each way to copy, as long as there is time for another one."""
        for source, copies in ways.items():
            if not goes_on():
                self._record.leave_out(f"copies beside steps: {source}")
                continue
            try:
                for copying in copies():
                    self._rows += _measured(copying, self._machine, self._alone)
            except Exception as error:  # noqa: BLE001 - what does not load is part of the report
                self._rows.append({"copy": source, "failed": f"{error!r}"[:300]})
            self._record.put(self._rows, "steps", "rows")


def _measured(
    copying: Copying, machine: OnGpu | OnCpu, alone: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Both ways of one way to copy."""
    wrong = copying.wrong_rows()
    rows = []
    for way, copy in copying.ways.items():
        copy_s = machine.copying(copy)
        times, beside_s = machine.beside(copy, copy_s)
        step = distribution(times)
        rows.append(
            {
                "copy": copying.name,
                "programs": copying.programs,
                "way": way,
                "wrong_rows": wrong,
                "alone_gb_per_s": copying.count / copy_s / 1e9,
                "beside_gb_per_s": copying.count / beside_s / 1e9,
                "step_s": step,
                "step_ratio": step["p50"] / alone["p50"],
                "step_p99_ratio": step["p99"] / alone["p99"],
            }
        )
    return rows
