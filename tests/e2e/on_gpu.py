"""The oracle on a GPU, by hand: every token of servers with our cache beside one without any.

    python -m tests.e2e.on_gpu --out out/gpu.json

All servers share the GPU and run side by side, on the reference platform with its tensors there.
With ``--device cpu`` the same runs on a CPU. Exit status 1 if a token
differs, a server dies or fails a check, or the host is not used.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.server import CPU, OURS, STRICT_CHECKS, Server, ServerError, running
from launch.tiny_model import ready_made
from launch.traffic import Traffic
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import Answer, converse, differences, hit_rates

TRAFFIC = Traffic(conversations=12, rounds=6)
TIER = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
ENVIRONMENT = {**CPU, "SGLANG_EXT_COPIES": "kernels", **STRICT_CHECKS}


def _cell(page: int, policy: str, *options: str) -> tuple[str, ...]:
    return ("--page-size", str(page), "--hicache-write-policy", policy, *options)


CHUNK = ("--chunked-prefill-size", "256")
CELLS = {
    "write_through, page 16": _cell(16, "write_through", *CHUNK),
    "write_through, page 64": _cell(64, "write_through", *CHUNK),
    "write_through, page 1": _cell(1, "write_through", *CHUNK),
    "write_back, page 16": _cell(16, "write_back"),
    "write_back, page_head": _cell(16, "write_back", "--hicache-mem-layout", "page_head"),
    "selective, page 64": _cell(64, "write_through_selective"),
    "page_first_direct": _cell(
        16, "write_through", "--hicache-mem-layout", "page_first_direct", *CHUNK
    ),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--option", action="append", default=[], help="for every server")
    parser.add_argument("--logs", type=Path, default=Path("out/gpu"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _serve(args: argparse.Namespace, name: str, options: Sequence[str]) -> list[Answer] | str:
    """What a server answers, or why it does not."""
    log = args.logs / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
    common = ["--model-path", str(ready_made(args.window)), *COMMON, *args.option]
    environment = {**ENVIRONMENT, "EXT_CPU_DEVICE": args.device}
    try:
        with running([*common, *options], log, environment) as server:
            return _answers(server)
    except (ServerError, OSError, AssertionError) as error:
        end = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
        return "\n".join([repr(error)[:300], *(line[:200] for line in end)])


def _answers(server: Server) -> list[Answer]:
    answers = converse(server, TRAFFIC)
    assert_idle_and_alive(server)
    return answers


def main() -> int:
    """Run the servers and compare."""
    args = _arguments()
    ready_made(args.window)
    servers = {"no cache": ("--disable-radix-cache", "--max-total-tokens", "16384")}
    servers |= {name: (*TIER, "--max-total-tokens", "3072", *CELLS[name]) for name in args.only}
    with ThreadPoolExecutor(len(servers)) as pool:
        runs = {name: pool.submit(_serve, args, name, servers[name]) for name in servers}
    results = {name: run.result() for name, run in runs.items()}
    expected = results.pop("no cache")
    report: dict[str, Any] = {}
    for name, answers in results.items():
        if isinstance(answers, str):
            report[name] = {"failed": answers}
        elif isinstance(expected, str):
            report[name] = {"answers": len(answers), **hit_rates(answers)}
        else:
            different = differences(expected, answers)
            report[name] = {
                "answers": len(answers), "different": len(different), **hit_rates(answers)
            }  # fmt: skip
    if isinstance(expected, str):
        report["no cache"] = {"failed": expected}
    for name, result in report.items():
        print(name, json.dumps({k: v for k, v in result.items() if k != "failed"}))
        print(result.get("failed", ""), end="")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))
    good = [r.get("different") == 0 and r["host_share"] > 0.1 for r in report.values()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
