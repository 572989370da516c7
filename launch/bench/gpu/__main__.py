"""What this project has to show on a GPU, in minutes: exact answers, served load, copies.

    python -m launch.bench.gpu --out out/gpu_bench.json
    python -m launch.bench.gpu --only exact served
    python -m launch.bench.gpu --small --device cpu

Servers run on the reference platform with its tensors on the GPU (``EXT_CPU_DEVICE=cuda``) and the
engine's own Triton attention. Each part is a process of its own and keeps within ``--limit``
seconds: it leaves out what it has no time for, and says so. The report is written after each cell,
and ends with every figure that has a bound. ``--small`` is the same at sizes for a CPU, where
attention is interpreted and speed is not judged. Exit status 1 if a part fails or misses a bound,
2 without a GPU. ``gpu_setup.sh`` beside this says what the machine needs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from launch.bench.gpu import part
from launch.bench.gpu.checks import judged, lines
from launch.bench.gpu.setting import (
    ROOT,
    Setting,
    compile_loops,
    end_servers,
    facts,
    sgl_kernel_state,
)
from sglang_ext.arguments import Parser, number, output_file, output_folder

GRACE_S = 20.0
"""Beyond its limit a part is ended: what a request of it waits for may never come."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="launch.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=part.PARTS, default=list(part.PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU; implied there")
    parser.add_argument("--limit", type=number(above=0), default=180.0, help="seconds of a part")
    parser.add_argument("--commit", help="of the code, where git does not know it")
    parser.add_argument("--logs", type=output_folder, default=ROOT / "out" / "gpu")
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "gpu_bench.json")
    args = parser.parse_args(argv)
    args.small |= args.device == "cpu"
    return args


class Report:
    """The whole report in its file.

    Args:
        path: of the file.
        data: what all parts have in common.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path = path
        self.data = {**data, "parts": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def take(self, name: str, setting: Setting, **more: Any) -> dict[str, Any]:
        """What a part has written so far becomes part of the report."""
        found: dict[str, Any] = {"ok": False}
        if setting.report.exists():
            found |= json.loads(setting.report.read_text())
        self.data["parts"][name] = {**found, **more}
        self._path.write_text(json.dumps(self.data, indent=1))
        return self.data["parts"][name]


def run_part(name: str, setting: Setting, report: Report) -> dict[str, Any]:
    """A part in a process of its own: what it has written when it ends, or has to."""
    began = time.monotonic()
    setting.logs.mkdir(parents=True, exist_ok=True)
    for former in (setting.report, setting.processes):
        former.unlink(missing_ok=True)
    # a new interpreter: one part's engine, CUDA context and end are not those of the next
    process = get_context("spawn").Process(target=part.work, args=(name, setting))
    process.start()
    while process.is_alive() and setting.left_s() > -GRACE_S:
        process.join(1.0)
        report.take(name, setting)
    more: dict[str, Any] = {}
    if process.is_alive():
        more = {"ok": False, "failed": f"ended after {time.monotonic() - began:.0f} s"}
        process.kill()
        process.join()
    elif process.exitcode:
        more = {"ok": False, "failed": f"its process ended with status {process.exitcode}"}
    if more:
        # of a part that has ended by itself there are none
        end_servers(setting)
        more["checks"] = judged(part.PARTS[name].checks(report.take(name, setting)), setting.device)
        print("\n".join(lines(more["checks"])))
    return report.take(name, setting, seconds=time.monotonic() - began, **more)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status."""
    args = parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run (--device cpu runs at small size)", file=sys.stderr)
        return 2
    compiled = sgl_kernel_state(args.device)
    common = {**facts(args.device, args.commit), "sgl_kernel": compiled, "small": args.small}
    report = Report(args.out, {**common, "compiling_s": compile_loops()})
    print(f"loops are compiled, {report.data['compiling_s']:.0f} s", flush=True)
    for name in args.only:
        logs: Path = args.logs / name
        setting = Setting(args.device, small=args.small, logs=logs, limit_s=args.limit)
        setting.has_sgl_kernel = compiled == "loads"
        # a part has the engine's pools too, and inherits these
        os.environ.update(setting.environment())
        print(f"== {name}", flush=True)
        found = run_part(name, setting, report)
        if "failed" in found:
            print(f"FAILED: {found['failed']}")
        said = "ok" if found["ok"] else "NOT OK"
        print(f"== {name}: {said}, {found['seconds']:.0f} s", flush=True)
    print(f"written: {args.out}")
    return 0 if all(found["ok"] for found in report.data["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
