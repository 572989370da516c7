"""Stock and ours under the same load in turns, on a model with the attention of gpt-oss-20b.

24 layers, every second one with a window of 128; 64 heads, 8 of K and V, 64 wide. An MLP has the
weights of the four experts that a token of gpt-oss-20b reads, so a token takes as long as there.
Weights are the engine's dummy ones: what is said does not matter here, how long it takes does.

The device has room for a quarter of what the conversations need; both hosts have the same bytes.
Only one server runs at a time, the others are stopped.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.bench import multiturn
from launch.bench.gpu.setting import ROOT, Setting, Wanted, has_graphs, waking
from launch.bench.metrics import metric
from launch.bench.pairs import HOST_TIER, OURS_HOST, STOCK, STOCK_HOST, compare, send
from launch.models import tiny
from launch.server import OURS, Server

WINDOW, PAGE, RATIO = 128, 64, "2"
BYTES = {
    "written_bytes": "sglang:hicache_backup_bytes_total",
    "loaded_bytes": "sglang:load_back_bytes_total",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Model and loads.

    Attributes:
        loads: flags of ``launch.bench.multiturn``, by name.
        device_tokens: of the device pool.
        data: options for the type of the numbers.
    """

    model: tiny.Shape
    loads: Mapping[str, Mapping[str, int]]
    device_tokens: int
    chunk: int
    turns: int
    data: Sequence[str]


def _loads(clients: int, rounds: int, asked: int, answer: int, parallel: int) -> dict[str, Any]:
    common = {"max-parallel": parallel, "request-length": asked, "output-length": answer}
    return {
        "multi-turn": {"num-clients": clients, "num-rounds": rounds, **common},
        # no prompt comes twice
        "no reuse": {"num-clients": clients, "num-rounds": 1, **common},
    }


LARGE = Size(
    tiny.Shape(24, 2880, 64, 8, 64, 11520, 32768),
    _loads(48, 4, 2048, 64, 8),
    device_tokens=101_376,  # of 405,504 that the conversations have at their end
    chunk=8192,
    turns=5,
    data=("--dtype", "bfloat16"),
)
SMALL = Size(
    tiny.Shape(2, 64, 4, 2, 16, 128, 512),
    _loads(4, 2, 128, 3, 2),
    device_tokens=512,
    chunk=256,
    turns=1,
    data=("--dtype", "float32"),
)
CACHES = {
    STOCK: (),
    STOCK_HOST: (*HOST_TIER, "--hicache-ratio", RATIO),
    OURS_HOST: (*OURS, *HOST_TIER, "--hicache-ratio", RATIO),
}
KERNEL = ("--hicache-io-backend", "kernel", "--hicache-mem-layout", "page_first")
"""The engine's copies that it compiles where it runs."""
DIRECT = ("--hicache-io-backend", "direct")
"""Needs ``sgl_kernel`` on a GPU; on a CPU the platform has it."""


def model(size: Size) -> Path:
    """Configuration and tokenizer of the model, without weights; made anew."""
    out = ROOT / ".models" / f"gpu-{size.model.layers}-{size.model.hidden}"
    out.mkdir(parents=True, exist_ok=True)
    tiny.build_config(size.model, WINDOW, 2, 131072).save_pretrained(out)
    tiny.write_tokenizer(out, size.model.vocab)
    return out


def common(size: Size, path: Path, setting: Setting) -> list[str]:
    """Options of all servers."""
    return [
        *("--model-path", str(path), "--load-format", "dummy", *size.data),
        *("--page-size", str(PAGE), "--max-total-tokens", str(size.device_tokens)),
        # of a GPU that several servers share: the pool has the size above, and the rest is free
        *("--mem-fraction-static", "0.85", "--chunked-prefill-size", str(size.chunk)),
        *("--max-running-requests", "16", "--enable-metrics", "--sleep-on-idle"),
        *("--disable-prefill-cuda-graph", "--skip-server-warmup"),
        *(KERNEL if setting.device == "cuda" else DIRECT),
    ]


def _copied(server: Server) -> dict[str, float]:
    text = server.get("/metrics")
    return {key: metric(text, name) for key, name in BYTES.items()}


def measure(server: Server, load: Mapping[str, int], path: Path, seed: int) -> dict[str, float]:
    """One turn of a server that is stopped otherwise."""
    with waking(server):
        before = _copied(server)
        samples, wall = send(server, load, path, seed)
        after = _copied(server)
    found = multiturn.summarize(samples, wall)
    return {
        **{f"ttft_{key}_s": found["ttft_s"][key] for key in ("mean", "p50", "p99")},
        "itl_p50_s": found["itl_s"]["p50"],
        "itl_p99_s": found["itl_s"]["p99"],
        "input_tokens_per_s": found["throughput"]["input_tokens_per_s"],
        "output_tokens_per_s": found["throughput"]["output_tokens_per_s"],
        **{f"hit_rate_{tier}": found["hit_rate"][tier] for tier in ("total", "device", "host")},
        **{key: after[key] - before[key] for key in BYTES},
        "wall_s": wall,
    }


LATER = 1000
"""Between the seeds of one load and the next: no prompt of one is in another."""


def turns_of(
    servers: Mapping[str, Server],
    load: Mapping[str, int],
    path: Path,
    most: int,
    limit_s: float,
    first_seed: int,
) -> list[dict[str, dict[str, float]]]:
    """Turns of all servers, as many as there is time for; behind one that does not count."""
    turns: list[dict[str, dict[str, float]]] = []
    longest, end = 0.0, time.monotonic() + limit_s
    for turn in range(most + 1):
        began = time.monotonic()
        # whoever goes first in one turn goes last in the next
        order = list(servers) if turn % 2 else list(servers)[::-1]
        done = {name: measure(servers[name], load, path, first_seed + turn) for name in order}
        if turn:
            turns.append({name: done[name] for name in servers})
        longest = max(longest, time.monotonic() - began)
        if turns and time.monotonic() + longest > end:
            break
    return turns


def run(setting: Setting) -> dict[str, Any]:
    """The part: its report, with ``ok``."""
    size = SMALL if setting.small else LARGE
    path = model(size)
    report: dict[str, Any] = {
        "ok": True,
        "size": dataclasses.asdict(size),
        "page": PAGE,
        "loads": {},
    }
    with contextlib.ExitStack() as stack:
        wanted = {name: Wanted(options) for name, options in CACHES.items()}
        servers, failed = setting.up(stack, wanted, common(size, path, setting))
        if not servers and setting.device == "cuda":
            # what fails first on a new machine is the capture of graphs
            report["failed_with_graphs"] = failed
            stack.close()
            without = [*common(size, path, setting), "--disable-cuda-graph"]
            servers, failed = setting.up(stack, wanted, without)
        if failed:
            return {**report, "ok": False, "failed": failed}
        report["cuda_graphs"] = all(map(has_graphs, servers.values()))
        for server in servers.values():
            os.killpg(server.process.pid, signal.SIGSTOP)
        for number, (name, load) in enumerate(size.loads.items()):
            # turns without reuse are short
            limit_s = setting.left_s() * (0.75 if name == "multi-turn" else 0.9)
            turns = turns_of(servers, load, path, size.turns, limit_s, LATER * number)
            report["loads"][name] = {**compare(turns), "turns": turns}
    hits = report["loads"]["multi-turn"]["median"][OURS_HOST]
    report["ok"] = hits["hit_rate_host"] > 0
    return report


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader: medians of the turns."""
    if "failed" in report:
        return [f"{name}: {text.splitlines()[-1]:.100}" for name, text in report["failed"].items()]
    lines = []
    for load, found in report["loads"].items():
        count = len(found["turns"])
        lines.append(
            f"{load}, {count} turns".ljust(22)
            + "TTFT ms: mean    p50     p99   ITL p99   in tok/s   hits: device  host   GB out   in"
        )
        for name, row in found["median"].items():
            ttft = [1e3 * row[f"ttft_{key}_s"] for key in ("mean", "p50", "p99")]
            lines.append(
                f"{name:22}{ttft[0]:>13.1f}{ttft[1]:>7.1f}{ttft[2]:>8.1f}"
                f"{1e3 * row['itl_p99_s']:>10.2f}{row['input_tokens_per_s']:>11.0f}"
                f"{row['hit_rate_device']:>15.3f}{row['hit_rate_host']:>6.3f}"
                f"{row['written_bytes'] / 1e9:>9.2f}{row['loaded_bytes'] / 1e9:>5.2f}"
            )
    if not report["cuda_graphs"]:
        lines.append("decode steps without CUDA graphs")
    return lines
