"""Copies beside work: a decode step without a server (``steps``), requests on one."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch.bench.gpu import requests, served, steps
from launch.bench.gpu.setting import Setting, Wanted, has_graphs
from launch.bench.pairs import STOCK, STOCK_HOST
from launch.server import OURS

KERNEL = "ours, our kernel"


def _servers(setting: Setting) -> dict[str, Wanted]:
    tier = ("--enable-hierarchical-cache", "--hicache-write-policy", "write_through")
    tier = (*tier, "--hicache-ratio", served.RATIO)
    wanted = {
        STOCK: Wanted(()),
        STOCK_HOST: Wanted(tier),
        KERNEL: Wanted((*OURS, *tier), {"SGLANG_EXT_COPIES": "kernels"}),
        "ours, engine's copies": Wanted((*OURS, *tier), {"SGLANG_EXT_COPIES": "engine"}),
    }
    if setting.has_sgl_kernel:
        direct = (*OURS, *tier, *served.DIRECT, "--hicache-mem-layout", "page_first_direct")
        wanted["ours, engine's direct"] = Wanted(direct, {"SGLANG_EXT_COPIES": "engine"})
    return {STOCK_HOST: wanted[STOCK_HOST], KERNEL: wanted[KERNEL]} if setting.small else wanted


def run(setting: Setting) -> dict[str, Any]:
    """The part: its report, with ``ok``."""
    device = torch.device(setting.device)
    report: dict[str, Any] = {
        "steps": steps.measure(steps.SMALL if setting.small else steps.LARGE, device),
        "requests": {},
    }
    size = served.SMALL if setting.small else served.LARGE
    load = requests.SMALL if setting.small else requests.LARGE
    path: Path = served.model(size)
    with contextlib.ExitStack() as stack:
        options = served.common(size, path, setting)
        servers, failed = setting.up(stack, _servers(setting), options)
        if not servers and setting.device == "cuda":
            report["failed_with_graphs"] = failed
            stack.close()
            without = [*options, "--disable-cuda-graph"]
            servers, failed = setting.up(stack, _servers(setting), without)
        report["cuda_graphs"] = all(map(has_graphs, servers.values()))
        for name, server in servers.items():
            report["requests"][name] = requests.measure(server, load)
    report["failed"] = failed
    report["ok"] = not failed and all(
        phases["host"]["host"] > 0 for name, phases in report["requests"].items() if name != STOCK
    )
    return report


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader."""
    alone = report["steps"]["step_alone_s"]
    lines = [
        f"a step alone: {1e3 * alone['p50']:.3f} ms, p99 {1e3 * alone['p99']:.3f}",
        "copy                          programs  way        GB/s: alone  beside  step: p50 ms"
        "   p99 ms  ratio",
    ]
    for row in report["steps"]["rows"]:
        if "failed" in row:
            lines.append(f"{row['copy']:30} FAILED {row['failed']:.80}")
            continue
        step = row["step_s"]
        lines.append(
            f"{row['copy']:30}{row['programs'] or '':>8}  {row['way']:10}"
            f"{row['alone_gb_per_s']:>12.1f}{row['beside_gb_per_s']:>8.1f}"
            f"{1e3 * step['p50']:>14.3f}{1e3 * step['p99']:>9.3f}{row['step_ratio']:>7.2f}"
        )
    lines.append(
        "between tokens, ms        beside     mean     p50     p99   from device  from host"
    )
    for name, phases in report["requests"].items():
        for phase, found in phases.items():
            itl = [1e3 * found["itl_s"].get(key, float("nan")) for key in ("mean", "p50", "p99")]
            lines.append(
                f"{name:26}{phase:8}{itl[0]:>7.2f}{itl[1]:>8.2f}{itl[2]:>8.2f}"
                f"{found['device']:>14}{found['host']:>11}"
            )
    lines += [f"{name} FAILED {text[-80:]}" for name, text in report["failed"].items()]
    return lines
