"""``sglang-ext gpu-check``: does the GPU kernel copy every byte, and how fast?

Every layout, data type and row size is compared with the reference, and transfers are compared
beside a forward pass that is late; then the bandwidth of both directions is printed beside that of
a plain copy of as many bytes between the GPU and pinned memory, and beside the peak of the link:
the rate of its PCIe generation and width, the highest that the driver names for this card in this
machine. Packets have headers, so no copy reaches it. The last line is the verdict. All of it ends
within a minute: what there is no time for is left out, and the verdict says so.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sglang_ext.arguments import Parser, output_file, whole

if TYPE_CHECKING:
    import torch

    from sglang_ext.kernels.page_copy.gpu import GpuPageCopier
    from sglang_ext.kernels.page_copy.plane import Plane

_LAYERS, _HEADS, _WIDTH, _PAGE = 18, 8, 64, 64
"""Of the copies that are timed: full-attention layers of gpt-oss, bfloat16."""
_REPEATS = 9
_INTERPRETED = 3
"""Programs in the interpreter, which runs one after the other."""
_LANES = {1: 2.0, 2: 4.0, 3: 8 * 128 / 130, 4: 16 * 128 / 130, 5: 32 * 128 / 130, 6: 64 * 0.945}
"""Gigabits a second of one lane, by PCIe generation: transfers less the coding of the line."""
_FAST = 0.8
"""Of a plain copy, the least bandwidth of any layout that is no cause for a look."""
_SHAPES_S, _LIMIT_S = 35.0, 50.0
"""On a GPU no shape is begun after the first, and no layout is timed after the second."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="sglang-ext gpu-check", description=__doc__)
    parser.add_argument(
        "--mebibytes", type=whole(1), default=256, help="size of a copy that is timed"
    )
    parser.add_argument(
        "--programs", nargs="+", type=whole(1), help="programs of the kernel that are timed"
    )
    parser.add_argument("--out", type=output_file, help="write what was measured, JSON")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="check the kernel on the CPU, in Triton's interpreter; nothing is timed",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all bytes are equal, 1 when some are not or the check fails, 2 without
    a GPU."""
    args = parse_args(argv)
    began = time.perf_counter()
    if args.interpret:
        # read when the kernel is imported
        os.environ["TRITON_INTERPRET"] = "1"

    import torch

    if not args.interpret and not torch.cuda.is_available():
        print("no GPU here: nothing was checked (--interpret checks without one)", file=sys.stderr)
        return 2
    found = Found()
    try:
        _examine(args, found, began)
    except Exception as error:  # noqa: BLE001 - a driver or a compiler: whatever it is, a verdict
        found.failed = f"{error!r}".partition("\\n")[0][:200]
    said = verdict(found)
    print(f"{said} ({time.perf_counter() - began:.0f} s)")
    if found.figures is not None and args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"verdict": said, **found.figures}, indent=1))
    return 1 if found.wrong or found.failed else 0


@dataclasses.dataclass
class Found:
    """What a check knows so far.

    Attributes:
        wrong: copies that differ and transfers out of order.
        failed: why it ended early; empty if it did not.
        left_out: what there was no time for.
        figures: what was timed; None if nothing was.
    """

    wrong: int = 0
    failed: str = ""
    left_out: list[str] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] | None = None


def _examine(args: argparse.Namespace, found: Found, began: float) -> None:
    import torch

    if args.interpret:
        # as long as it takes: nobody's server waits
        _check(torch.device("cpu"), (1, 16), found, math.inf)
        return
    device = torch.device("cuda")
    found.wrong += _check_order()
    _check(device, (1, 16, 64), found, began + _SHAPES_S)
    if not found.wrong:
        found.figures = _time(device, args.mebibytes << 20, args.programs, found, began + _LIMIT_S)


def verdict(found: Found) -> str:
    """One line for an operator."""
    if found.failed:
        return f"verdict: FAILED, {found.failed}; do not use SGLANG_EXT_COPIES=kernels here"
    if found.wrong:
        return f"verdict: WRONG, {found.wrong} faults; do not use SGLANG_EXT_COPIES=kernels here"
    left = f"; no time for {', '.join(found.left_out)}" if found.left_out else ""
    if found.figures is None:
        return f"verdict: right, not timed{left}"
    plain, *rows = found.figures["gigabytes_per_s"]
    # with the number of programs that servers use; others are there to be looked at
    rows = [row for row in rows if row["programs"] == found.figures["default_programs"]] or rows
    if not rows:
        return f"verdict: right, not timed{left}"
    parts = {way: min(row[way] for row in rows) / plain[way] for way in ("to_host", "to_device")}
    said = ", ".join(
        f"{way.replace('_', ' ')} {part:.2f} of a plain copy" for way, part in parts.items()
    )
    peak = found.figures["link"]["peak_gb_per_s"]
    if peak is not None:
        least = min(min(row[way] for row in rows) for way in parts)
        said += f", {least / peak:.2f} of the link's {peak:.1f} GB/s"
    quick = "fast" if min(parts.values()) >= _FAST else f"SLOW, below {_FAST} of a plain copy"
    return f"verdict: right and {quick}; the slowest layout: {said}{left}"


def _check(device: "torch.device", pages: Sequence[int], found: Found, until: float) -> None:
    """Compare copies with the reference: how many differ is in ``found``."""
    from sglang_ext.kernels.page_copy import reference
    from sglang_ext.kernels.page_copy.gpu import PROGRAMS, GpuPageCopier

    words: set[int] = set()

    def make(components: "Sequence[Sequence[Plane]]") -> GpuPageCopier:
        copier = GpuPageCopier(components, PROGRAMS if device.type == "cuda" else _INTERPRETED)
        words.add(copier.word)
        return copier

    cases = list(reference.cases(pages))
    done, lines = 0, list[str]()
    for case in cases:
        if time.perf_counter() > until:
            found.left_out.append(f"{len(cases) - done} of {len(cases)} shapes")
            break
        lines += reference.differences(case, device, make)
        done += 1
    for line in lines:
        print("DIFFERENT:", line)
    moved = ", ".join(map(str, sorted(words)))
    print(f"{done} shapes, words of {moved} bytes: {len(lines)} copies differ")
    found.wrong += len(lines)


def _check_order() -> int:
    """Number of faults in the order of transfers."""
    from sglang_ext.tools import cuda_check

    found = cuda_check.faults()
    for fault in found:
        print("OUT OF ORDER:", fault)
    print(f"streams and events beside a late forward pass: {len(found)} faults")
    return len(found)


def link_of(generation: str, width: str) -> dict[str, Any]:
    """The link between GPU and host, and its peak in each direction.

    Args:
        generation: of PCIe, as the driver says it.
        width: lanes, as the driver says it.

    Returns:
        ``link`` for a reader, and ``peak_gb_per_s``: None if the driver does not name the link, as
        on some virtual machines, or names one that is not known here.
    """
    lane = _LANES.get(int(generation)) if generation.isdecimal() else None
    if lane is None or not width.isdecimal():
        return {"link": "not known", "peak_gb_per_s": None}
    return {"link": f"PCIe {generation} x{width}", "peak_gb_per_s": lane * int(width) / 8}


def _link() -> dict[str, Any]:
    fields = "pcie.link.gen.max,pcie.link.width.max"
    generation, _, width = _asked(fields).partition(",")
    return link_of(generation.strip(), width.strip())


def _asked(fields: str) -> str:
    """What the driver says of the GPU; nothing if it does not."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _time(
    device: "torch.device",
    size: int,
    counts: Sequence[int] | None,
    found: Found,
    until: float,
) -> dict[str, Any]:
    """Bandwidth in GB/s: plain copies, and the kernel by layout, number of programs (the one that
    servers use, if ``counts`` is None) and direction."""
    import numpy as np
    import torch
    import triton

    from sglang_ext.kernels.page_copy.gpu import PROGRAMS, GpuPageCopier
    from sglang_ext.kernels.page_copy.plane import LAYOUTS, Plane, host_by_page, host_shape

    row = _HEADS * _WIDTH * 2
    pages = size // (_LAYERS * _PAGE * row)
    size = pages * _LAYERS * _PAGE * row
    plain = torch.empty(size, dtype=torch.uint8, device=device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    rows: list[dict[str, Any]] = []

    def measure(name: str, programs: int | None, **runs: Callable[[], object]) -> None:
        speeds = {way: round(_bandwidth(size, run), 1) for way, run in runs.items()}
        rows.append({"copy": name, "programs": programs, **speeds})
        shown = "   ".join(f"{way.replace('_', ' ')} {speed:6.1f}" for way, speed in speeds.items())
        print(f"{name:18}{programs or '':>3}   {shown}")

    link = _link()
    peak = f", {link['peak_gb_per_s']:.1f} GB/s each way" if link["peak_gb_per_s"] else ""
    print(f"{torch.cuda.get_device_name(device)}, link: {link['link']}{peak}")
    print(f"{size >> 20} MiB a copy, GB/s, by programs")
    measure(
        "plain copy",
        None,
        to_host=lambda: pinned.copy_(plain, non_blocking=True),
        to_device=lambda: plain.copy_(pinned, non_blocking=True),
    )
    tokens = 2 * pages * _PAGE
    layers = tuple(
        torch.empty(tokens, _HEADS, _WIDTH, dtype=torch.bfloat16, device=device)
        for _ in range(_LAYERS)
    )
    random = np.random.default_rng(0)
    chosen = [random.permutation(2 * pages)[:pages].astype(np.int64) for _ in range(2)]
    for layout in LAYOUTS:
        shape = host_shape(
            layout, layers=_LAYERS, pages=2 * pages, page_tokens=_PAGE, heads=_HEADS, width=_WIDTH
        )
        host = torch.empty(shape, dtype=torch.bfloat16, pin_memory=True)
        plane = Plane(layers, host_by_page(host, layout, _PAGE))
        for programs in counts or [PROGRAMS]:
            if time.perf_counter() > until:
                found.left_out.append(f"{layout} with {programs} programs")
                continue
            copier = GpuPageCopier([[plane]], programs)
            job = copier.prepare([(chosen[0], chosen[1])])
            measure(
                layout,
                programs,
                to_host=partial(copier.copy_all, job, to_host=True),
                to_device=partial(copier.copy_all, job, to_host=False),
                layer_by_layer=partial(_by_layer, copier, job),
            )
    versions = {
        "sglang-ext": version("sglang-ext"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": _asked("driver_version") or "unknown",
    }
    return {
        "device": torch.cuda.get_device_name(device), "versions": versions, "link": link,
        "bytes": size, "page": _PAGE, "row_bytes": row, "layers": _LAYERS,
        "default_programs": PROGRAMS, "gigabytes_per_s": rows,
    }  # fmt: skip


def _by_layer(copier: "GpuPageCopier", job: "torch.Tensor") -> None:
    """As a load does it."""
    for layer in range(_LAYERS):
        copier.copy_layers(job, 0, range(layer, layer + 1), to_host=False)


def _bandwidth(size: int, run: Callable[[], object]) -> float:
    """GB/s, the median of some runs behind one that warms up."""
    import torch

    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    return size / 1e6 / float(statistics.median(milliseconds))
