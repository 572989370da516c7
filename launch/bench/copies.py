"""Bandwidth of page copies by the CPU kernel, beside memcpy and beside indexed copies in PyTorch.

The same bytes three ways, in turns: pages between a device side (layer by layer) and a host side
in each layout; one contiguous memcpy of as many bytes; the loop over layers with token indices
that a CPU platform has otherwise. Medians of ratios.

    python -m launch.bench.copies --out out/copies.json
"""

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sglang_ext.arguments import Parser, output_file, whole
from sglang_ext.kernels.page_copy.cpu import CpuPageCopier
from sglang_ext.kernels.page_copy.plane import LAYOUTS, Plane, host_by_page, host_shape

LAYERS, HEADS = 8, 4
WIDTHS = (64, 128)
"""Elements of a head, float32: rows of 1 and 2 KiB."""
PAGES = (64, 16, 1)
THREADS = (1, 2)
REPEATS = 9


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_file, default=Path("out/copies.json"))
    parser.add_argument("--mebibytes", type=whole(1), default=64, help="size of one copy")
    return parser.parse_args(argv)


class Cell:
    """Memory of one shape, twice as large as a copy, and the random pages of the copy."""

    def __init__(self, layout: str, page: int, width: int, size: int) -> None:
        self.page = page
        pages = size // (LAYERS * page * HEADS * width * 4)
        self.size = pages * LAYERS * page * HEADS * width * 4
        shape = host_shape(
            layout, layers=LAYERS, pages=2 * pages, page_tokens=page, heads=HEADS, width=width
        )
        layers = tuple(torch.ones(2 * pages * page, HEADS, width) for _ in range(LAYERS))
        self.plane = Plane(layers, host_by_page(torch.ones(shape), layout, page))
        random = np.random.default_rng(0)
        self.host = random.permutation(2 * pages)[:pages].astype(np.int64)
        self.device = random.permutation(2 * pages)[:pages].astype(np.int64)
        self._tokens = torch.from_numpy((self.device[:, None] * page + np.arange(page)).reshape(-1))
        self._host_page = torch.from_numpy(np.repeat(self.host, page))
        self._offset = torch.from_numpy(np.tile(np.arange(page), pages))

    def indexed(self, *, to_host: bool) -> None:
        """The loop over layers in PyTorch."""
        for number, layer in enumerate(self.plane.layers):
            host = self.plane.host[:, :, number]
            if to_host:
                host[self._host_page, self._offset] = layer[self._tokens]
            else:
                layer[self._tokens] = host[self._host_page, self._offset]


class Memcpy:
    """One contiguous copy of the C library, each thread its part."""

    def __init__(self, size: int, threads: int) -> None:
        self._source, self._target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        self._pool = ThreadPoolExecutor(threads)
        self._copy = ctypes.CDLL(None).memcpy
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        part = size // threads
        self._parts = [
            (self._target.data_ptr() + i * part, self._source.data_ptr() + i * part, part)
            for i in range(threads)
        ]

    def __call__(self) -> None:
        if len(self._parts) == 1:
            self._copy(*self._parts[0])
            return
        for future in [self._pool.submit(self._copy, *part) for part in self._parts]:
            future.result()


def second_run(run: Callable[[], object]) -> float:
    """Seconds of the second of two calls: PyTorch's threads still spin for a while after the
    indexed loop, and what is measured next would share its CPUs with them."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(layout: str, page: int, width: int, threads: int, size: int) -> list[dict[str, Any]]:
    """Both directions of one shape, and loads layer by layer, as a running batch waits for them."""
    cell = Cell(layout, page, width, size)
    copier = CpuPageCopier([[cell.plane]], threads)
    memcpy = Memcpy(cell.size, threads)
    job = copier.prepare([(cell.host, cell.device)])
    torch.set_num_threads(threads)

    def by_layer() -> None:
        for layer in range(LAYERS):
            copier.copy_layers(job, 0, range(layer, layer + 1), to_host=False)

    ways: dict[str, tuple[Callable[[], object], bool]] = {
        "to host": (lambda: copier.copy_all(job, to_host=True), True),
        "to device": (lambda: copier.copy_all(job, to_host=False), False),
        "to device, by layer": (by_layer, False),
    }
    rows = []
    for name, (run, to_host) in ways.items():
        turns = []
        for turn in range(REPEATS + 1):
            times = {
                "kernel": second_run(run),
                "memcpy": second_run(memcpy),
                "indexed": second_run(lambda to_host=to_host: cell.indexed(to_host=to_host)),
            }
            if turn:  # the first one touches the memory
                turns.append(times)
        rows.append(
            {
                "layout": layout,
                "page": page,
                "row_bytes": HEADS * width * 4,
                "threads": threads,
                "copy": name,
                "gb_per_s": {
                    way: cell.size / statistics.median(t[way] for t in turns) / 1e9
                    for way in turns[0]
                },
                "of_memcpy": statistics.median(t["memcpy"] / t["kernel"] for t in turns),
                "of_indexed": statistics.median(t["indexed"] / t["kernel"] for t in turns),
            }
        )
    copier.close()
    return rows


def main() -> None:
    """Every shape; a table and a file."""
    args = parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy")}
    rows: list[dict[str, Any]] = []
    shapes = list(itertools.product(LAYOUTS, PAGES, WIDTHS, THREADS))
    for shape in tqdm(shapes, desc="shapes"):
        rows += measure(*shape, args.mebibytes << 20)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"versions": versions, "machine": platform.machine(), "rows": rows}
    args.out.write_text(json.dumps(report, indent=1))
    for row in rows:
        print(
            f"{row['layout']:18}page {row['page']:<4}row {row['row_bytes']:<6}"
            f"threads {row['threads']}  {row['copy']:20}"
            f"{row['gb_per_s']['kernel']:6.1f} GB/s {row['of_memcpy']:6.2f} of memcpy"
            f"{row['of_indexed']:7.1f} times indexed"
        )
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
