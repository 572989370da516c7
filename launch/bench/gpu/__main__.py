"""What this project has to show on a GPU, in minutes: exact answers, served load, copies.

    python -m launch.bench.gpu --out out/gpu_bench.json
    python -m launch.bench.gpu --only exact served
    python -m launch.bench.gpu --small --device cpu

Servers run on the reference platform with its tensors on the GPU (``EXT_CPU_DEVICE=cuda``) and the
engine's own Triton attention. Each part keeps within ``--limit`` seconds, and the report is
written after each. ``--small`` is the same at sizes for a CPU, where attention is interpreted.
Exit status 1 if a part does not hold what it checks. ``gpu_setup.sh`` beside this says what the
machine needs.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from launch.bench.gpu import copies, exact, served
from launch.bench.gpu.setting import ROOT, Setting, facts
from sglang_ext.arguments import Parser, number, output_file, output_folder

PARTS: dict[str, ModuleType] = {"exact": exact, "served": served, "copies": copies}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="launch.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU; implied there")
    parser.add_argument("--limit", type=number(above=0), default=240.0, help="seconds of a part")
    parser.add_argument("--commit", help="of the code, where git does not know it")
    parser.add_argument("--logs", type=output_folder, default=ROOT / "out" / "gpu")
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "gpu_bench.json")
    args = parser.parse_args(argv)
    args.small |= args.device == "cpu"
    return args


def _run(name: str, setting: Setting) -> dict[str, Any]:
    part = PARTS[name]
    setting.logs.mkdir(parents=True, exist_ok=True)
    try:
        # bars and warnings; what is printed is the table
        with (setting.logs / "bench.log").open("w") as log, contextlib.redirect_stderr(log):
            report: dict[str, Any] = part.run(setting)
        lines = part.table(report)
    except Exception as error:  # noqa: BLE001 - the other parts have a chance still
        traceback.print_exc()
        return {"ok": False, "failed": f"{error!r}"[:500]}
    print("\n".join(lines), flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status."""
    args = parse_args(argv)
    report: dict[str, Any] = {**facts(args.device, args.commit), "small": args.small, "parts": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        began = time.monotonic()
        logs: Path = args.logs / name
        setting = Setting(args.device, small=args.small, logs=logs, limit_s=args.limit)
        # this process has the engine's pools too, in the part on copies
        os.environ.update(setting.environment())
        print(f"== {name}", flush=True)
        part = _run(name, setting)
        report["parts"][name] = {"seconds": time.monotonic() - began, **part}
        args.out.write_text(json.dumps(report, indent=1))
        said = "ok" if part["ok"] else "NOT OK"
        print(f"== {name}: {said}, {report['parts'][name]['seconds']:.0f} s", flush=True)
    print(f"written: {args.out}")
    return 0 if all(part["ok"] for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
