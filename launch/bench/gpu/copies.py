"""Copies beside work: a decode step without a server (``steps``), requests on one."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from launch.bench.gpu import requests, served, steps
from launch.bench.gpu.checks import Check
from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import Setting, Wanted, has_graphs, reason
from launch.bench.pairs import STOCK, STOCK_HOST
from launch.server import OURS, Server

KERNEL, ENGINES, DIRECT = "ours, our kernel", "ours, engine's copies", "ours, engine's direct"
RATIO = "2"
"""Host memory in sizes of the device's pools: each prefix stays there."""
SLOWER, OF_PLAIN = 1.05, 0.9
"""Most of a time beside copies to that without, and least of a plain copy's bandwidth."""


def _servers(setting: Setting) -> dict[str, Wanted]:
    tier = ("--enable-hierarchical-cache", "--hicache-write-policy", "write_through")
    tier = (*tier, "--hicache-ratio", RATIO)
    wanted = {
        STOCK: Wanted(()),
        STOCK_HOST: Wanted(tier),
        KERNEL: Wanted((*OURS, *tier), {"SGLANG_EXT_COPIES": "kernels"}),
        ENGINES: Wanted((*OURS, *tier), {"SGLANG_EXT_COPIES": "engine"}),
    }
    if setting.has_sgl_kernel:
        direct = (*OURS, *tier, *served.DIRECT, "--hicache-mem-layout", "page_first_direct")
        wanted[DIRECT] = Wanted(direct, {"SGLANG_EXT_COPIES": "engine"})
    # STOCK is what the others are held beside
    return {name: wanted[name] for name in (STOCK, KERNEL)} if setting.small else wanted


def _start(setting: Setting, stack: contextlib.ExitStack, record: Record) -> dict[str, Server]:
    size = served.SMALL if setting.small else served.LARGE
    path: Path = served.model(size)
    options = served.common(size, path, setting)
    servers, failed = setting.up(stack, _servers(setting), options)
    if not servers and setting.device == "cuda":
        record.put(failed, "failed_with_graphs")
        stack.close()
        servers, failed = setting.up(stack, _servers(setting), [*options, "--disable-cuda-graph"])
    record.put(all(map(has_graphs, servers.values())), "cuda_graphs")
    record.put(failed, "failed_servers")
    return servers


def _requests(setting: Setting, record: Record) -> None:
    load = requests.SMALL if setting.small else requests.LARGE
    with contextlib.ExitStack() as stack:
        for name, server in _start(setting, stack, record).items():
            if setting.left_s() <= 0:
                record.leave_out(f"requests: {name}")
                continue
            try:
                record.put(requests.measure(server, load), "requests", name)
            except Exception as error:  # noqa: BLE001 - one server's end is not that of the others
                said = f"{error!r}"[:300] + "\n" + server.tail(12)
                record.put(said, "failed_servers", name)


def run(setting: Setting, record: Record) -> None:
    """The part, into its record."""
    device, size = torch.device(setting.device), steps.SMALL if setting.small else steps.LARGE

    def goes_on() -> bool:
        return setting.left_s() > 0

    beside = steps.Beside(size, device, record)
    beside.measure(steps.sources(size, device), goes_on)
    _requests(setting, record)
    beside.measure(steps.other_programs(size, device), goes_on)


def checks(report: Mapping[str, Any]) -> list[Check]:
    """No copy loses a row, none is slow, and none is in the way of what decodes beside it."""
    return [*_of_steps(report.get("steps", {})), *_of_requests(report)]


def _of_steps(found: Mapping[str, Any]) -> Iterator[Check]:
    rows = [row for row in found.get("rows", []) if "failed" not in row]
    # a row of each copy, whichever its way
    copies = {(row["copy"], row["programs"]): row["wrong_rows"] for row in rows}
    wrong = sum(copies.values()) if copies else None
    yield Check(f"rows that {len(copies)} ways to copy got wrong, there and back", wrong, 0)
    plain = {row["way"]: row["alone_gb_per_s"] for row in rows if row["copy"] == steps.PLAIN}
    mine = [row for row in rows if row["copy"].startswith(f"{steps.OURS},")]
    used = {row["way"]: row for row in mine if row["programs"] == found["default_programs"]}
    for way in ("to_host", "to_device"):
        row, said = used.get(way, {}), f"our kernel {way.replace('_', ' ')}"
        speed = row["alone_gb_per_s"] / plain[way] if row and way in plain else None
        yield Check(f"{said}: of a plain copy", speed, OF_PLAIN, at_least=True, timed=True)
        slower = row.get("step_p99_ratio")
        yield Check(f"{said}: p99 of a step beside it", slower, SLOWER, timed=True)


def _of_requests(report: Mapping[str, Any]) -> Iterator[Check]:
    measured = report.get("requests", {})
    judged = [name for name in measured if name in (KERNEL, ENGINES)]
    for name in judged or [KERNEL]:
        phases = measured.get(name, {})
        hits = phases.get("host", {}).get("host")
        yield Check(f"{name}: tokens from the host", hits, 1, at_least=True)
        # the same requests, found on the device; and the same ones without anything to back up
        for what, phase, other in (
            ("loads", "host", phases.get("device", {})),
            ("backups", "new", measured.get(STOCK, {}).get("new", {})),
        ):
            ours, none = (
                each.get("itl_s", {}).get("p99") for each in (phases.get(phase, {}), other)
            )
            ratio = ours / none if ours and none else None
            said = f"{name}: p99 between tokens beside {what}, to that without"
            yield Check(said, ratio, SLOWER, timed=True)


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader."""
    found = report.get("steps", {})
    alone = found.get("step_alone_s", {"p50": float("nan"), "p99": float("nan")})
    lines = [
        f"a step alone: {1e3 * alone['p50']:.3f} ms, p99 {1e3 * alone['p99']:.3f}",
        "copy                                programs  way        GB/s: alone  beside  step: p50 ms"
        "   p99 ms  ratio  of p99",
    ]
    for row in found.get("rows", []):
        if "failed" in row:
            lines.append(f"{row['copy']:36} FAILED {row['failed']:.80}")
            continue
        step, wrong = row["step_s"], row["wrong_rows"]
        lines.append(
            f"{row['copy']:36}{row['programs'] or '':>8}  {row['way']:10}"
            f"{row['alone_gb_per_s']:>12.1f}{row['beside_gb_per_s']:>8.1f}"
            f"{1e3 * step['p50']:>14.3f}{1e3 * step['p99']:>9.3f}{row['step_ratio']:>7.2f}"
            f"{row['step_p99_ratio']:>8.2f}{f'  {wrong} ROWS WRONG' if wrong else ''}"
        )
    lines.append(
        "between tokens, ms        beside     mean     p50     p99   from device  from host"
    )
    for name, phases in report.get("requests", {}).items():
        for phase, told in phases.items():
            itl = [1e3 * told["itl_s"].get(key, float("nan")) for key in ("mean", "p50", "p99")]
            lines.append(
                f"{name:26}{phase:8}{itl[0]:>7.2f}{itl[1]:>8.2f}{itl[2]:>8.2f}"
                f"{told['device']:>14}{told['host']:>11}"
            )
    failed = report.get("failed_servers", {})
    return lines + [f"{name} FAILED {reason(text):.100}" for name, text in failed.items()]
