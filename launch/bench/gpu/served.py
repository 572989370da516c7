"""Stock and ours under the same load in turns, on a model with the attention of gpt-oss-20b.

24 layers, every second one with a window of 128; 64 heads, 8 of K and V, 64 wide. An MLP has the
weights of the four experts that a token of gpt-oss-20b reads, so a token takes as long as there.
Weights are the engine's dummy ones: what is said does not matter here, how long it takes does.

The device has room for a quarter of what the conversations need. Both hosts have the same bytes, as
many as the device's pools. Only one server runs at a time, the others are stopped.
"""

import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.bench import multiturn
from launch.bench.gpu.checks import Check
from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import ROOT, Setting, Wanted, has_graphs, reason, waking
from launch.bench.metrics import metric, settled
from launch.bench.pairs import HOST_TIER, OURS_HOST, STOCK, STOCK_HOST, compare, send
from launch.models import tiny
from launch.server import OURS, Server

WINDOW, PAGE = 128, 64
RATIO = "1"
"""Host memory in sizes of the device's pools."""
BYTES = {
    "written_bytes": "sglang:hicache_backup_bytes_total",
    "loaded_bytes": "sglang:load_back_bytes_total",
}


REUSE, NO_REUSE = "multi-turn", "no reuse"
THROUGHPUT, TTFT = "input_tokens_per_s", "ttft_mean_s"
BOUNDS = (
    # (load, beside which server, figure, bound of ours to that server's, whether it is the least)
    (REUSE, STOCK_HOST, THROUGHPUT, 1.5, True),
    (REUSE, STOCK_HOST, TTFT, 0.6, False),
    (REUSE, STOCK, THROUGHPUT, 1.8, True),
    (NO_REUSE, STOCK, THROUGHPUT, 0.99, True),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Model and loads.

    Attributes:
        loads: flags of ``launch.bench.multiturn``, by name.
        device_tokens: of the device pool.
        turns: most turns that count, by load.
        data: options for the type of the numbers.
    """

    model: tiny.Shape
    loads: Mapping[str, Mapping[str, int]]
    device_tokens: int
    chunk: int
    turns: Mapping[str, int]
    data: Sequence[str]


def _loads(clients: int, rounds: int, asked: int, answer: int, parallel: int) -> dict[str, Any]:
    common = {"max-parallel": parallel, "request-length": asked, "output-length": answer}
    return {
        REUSE: {"num-clients": clients, "num-rounds": rounds, **common},
        # no prompt comes twice
        NO_REUSE: {"num-clients": clients, "num-rounds": 1, **common},
    }


LARGE = Size(
    tiny.Shape(24, 2880, 64, 8, 64, 11520, 32768),
    _loads(48, 4, 2048, 64, 8),
    device_tokens=101_376,  # of 405,504 that the conversations have at their end
    chunk=8192,
    turns={REUSE: 5, NO_REUSE: 9},
    data=("--dtype", "bfloat16"),
)
SMALL = Size(
    tiny.Shape(2, 64, 4, 2, 16, 128, 512),
    _loads(8, 2, 128, 3, 2),
    # of 2,096. In less a request may wait forever with stock's host, though nothing runs
    device_tokens=1024,
    chunk=256,
    turns={REUSE: 1, NO_REUSE: 1},
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


def measure(
    server: Server, load: Mapping[str, int], path: Path, seed: int, limit_s: float
) -> dict[str, float]:
    """One turn of a server that is stopped otherwise.

    Raises:
        TimeoutError: not all is answered after ``limit_s`` seconds.
    """
    with waking(server):
        before = _copied(server)
        samples, wall = send(server, load, path, seed, limit_s)
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


def host_bytes(server: Server, size: Size) -> float:
    """Of a server's host memory: what ours says in its metrics, and stock when it allocates."""
    ours = metric(settled(server), "sglang_ext:host_memory_bytes")
    if ours:
        return ours
    shape, item = size.model, 4 if "float32" in size.data else 2
    # every second layer has a window, and K and V are as wide in all
    token = shape.layers // 2 * 2 * shape.kv_heads * shape.head_dim * item
    found = re.findall(r"host pool: (\d+) tokens", server.log.read_text(errors="replace"))
    return float(sum(int(tokens) * token for tokens in found))


LATER = 1000
"""Between the seeds of one load and the next: no prompt of one is in another."""


class Turns:
    """Turns of all servers under one load.

    Args:
        servers: by name, stopped. One that fails is ended and takes no further turn.
        load: flags of ``launch.bench.multiturn``.
        path: of the model.
        first_seed: of the first turn; each has another one.
        left_s: seconds that are left. Half of them are the most that one server has for its turn:
            one that answers no more takes no further turn, and the others have theirs.

    Attributes:
        done: what each server did, of the turns that count.
        failed: why a server is not in them any more.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        load: Mapping[str, int],
        path: Path,
        first_seed: int,
        left_s: Callable[[], float],
    ) -> None:
        self._servers, self._load, self._path = servers, load, path
        self._seed, self._left_s = first_seed, left_s
        self.done: list[dict[str, dict[str, float]]] = []
        self.failed: dict[str, str] = {}

    def warm_up(self) -> float:
        """Half of the load, which does not count: what is used for the first time is compiled. The
        seconds it took those that have not failed."""
        half = {**self._load, "num-clients": max(1, self._load["num-clients"] // 2)}
        _, seconds = self._take(half)
        return seconds

    def take(self) -> float:
        """One turn of all; the seconds it took those that have not failed."""
        done, seconds = self._take(self._load)
        self.done.append(done)
        return seconds

    def compared(self) -> dict[str, Any]:
        """Medians and ratios of the servers that have not failed."""
        left = [name for name in self._servers if name not in self.failed]
        turns = [{name: turn[name] for name in left} for turn in self.done]
        known = compare(turns) if turns and OURS_HOST in left else {}
        return {**known, "turns": self.done, "failed": self.failed}

    def _take(self, load: Mapping[str, int]) -> tuple[dict[str, dict[str, float]], float]:
        self._seed += 1
        # whoever goes first in one turn goes last in the next
        order = [name for name in self._servers if name not in self.failed]
        done, seconds = {}, 0.0
        for name in order[:: -1 if self._seed % 2 else 1]:
            began = time.monotonic()
            try:
                limit_s = max(1.0, self._left_s() / 2)
                done[name] = measure(self._servers[name], load, self._path, self._seed, limit_s)
            except Exception as error:  # noqa: BLE001 - one server's end is not that of the others
                self.failed[name] = f"{error!r}"[:300] + "\n" + self._servers[name].tail(12)
            else:
                seconds += time.monotonic() - began
        return {name: done[name] for name in order if name in done}, seconds


def _start(
    setting: Setting, size: Size, path: Path, stack: contextlib.ExitStack, record: Record
) -> dict[str, Server]:
    wanted = {name: Wanted(options) for name, options in CACHES.items()}
    servers, failed = setting.up(stack, wanted, common(size, path, setting))
    if not servers and setting.device == "cuda":
        # what fails first on a new machine is the capture of graphs
        record.put(failed, "failed_with_graphs")
        stack.close()
        without = [*common(size, path, setting), "--disable-cuda-graph"]
        servers, failed = setting.up(stack, wanted, without)
    record.put(failed, "failed_servers")
    if OURS_HOST not in servers or len(servers) < 2:
        raise RuntimeError(f"nothing to compare: {', '.join(failed)} did not start")
    record.put(all(map(has_graphs, servers.values())), "cuda_graphs")
    for name, server in servers.items():
        record.put(host_bytes(server, size), "host_bytes", name)
    return servers


def run(setting: Setting, record: Record) -> None:
    """The part, into its record."""
    size = SMALL if setting.small else LARGE
    path = model(size)
    record.put({**dataclasses.asdict(size), "page": PAGE, "host_ratio": RATIO}, "size")
    with contextlib.ExitStack() as stack:
        servers = _start(setting, size, path, stack, record)
        for server in servers.values():
            os.killpg(server.process.pid, signal.SIGSTOP)
        for number, (name, load) in enumerate(size.loads.items()):
            # turns without reuse are short
            reserve_s = setting.left_s() * (0.25 if name == REUSE else 0.0)
            turns = Turns(servers, load, path, LATER * number, setting.left_s)
            wanted = size.turns[name]
            longest = turns.warm_up()
            # one turn whatever is left for the others
            while len(turns.done) < wanted and (
                longest < setting.left_s() - (reserve_s if turns.done else 0.0)
            ):
                longest = turns.take()
                record.put(turns.compared(), "loads", name)
            if len(turns.done) < wanted:
                record.leave_out(f"{name}: {wanted - len(turns.done)} of {wanted} turns")
            servers = {each: servers[each] for each in servers if each not in turns.failed}


def checks(report: Mapping[str, Any]) -> list[Check]:
    """Ours beside stock, turn by turn; that both have the same host; that ours reads it."""
    claims = []
    for load, beside, key, bound, at_least in BOUNDS:
        ratios = report.get("loads", {}).get(load, {}).get("ours_to", {}).get(beside, {})
        what = f"{load}: {key} of ours to {beside}"
        claims.append(Check(what, ratios.get(key), bound, at_least=at_least, timed=True))
    hosts = report.get("host_bytes", {})
    ours, stock = hosts.get(OURS_HOST), hosts.get(STOCK_HOST)
    ratio = ours / stock if ours and stock else None
    claims.append(Check("host bytes of ours to those of stock + HiCache", ratio, 1.001))
    median = report.get("loads", {}).get(REUSE, {}).get("median", {}).get(OURS_HOST, {})
    hits = median.get("hit_rate_host")
    claims.append(Check(f"{REUSE}: hit rate of our host", hits, 0.01, at_least=True))
    return claims


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for a reader: medians of the turns."""
    lines = []
    for load, found in report.get("loads", {}).items():
        count = len(found["turns"])
        lines.append(
            f"{load}, {count} turns".ljust(22)
            + "TTFT ms: mean    p50     p99   ITL p99   in tok/s   hits: device  host   GB out   in"
        )
        for name, row in found.get("median", {}).items():
            ttft = [1e3 * row[f"ttft_{key}_s"] for key in ("mean", "p50", "p99")]
            lines.append(
                f"{name:22}{ttft[0]:>13.1f}{ttft[1]:>7.1f}{ttft[2]:>8.1f}"
                f"{1e3 * row['itl_p99_s']:>10.2f}{row['input_tokens_per_s']:>11.0f}"
                f"{row['hit_rate_device']:>15.3f}{row['hit_rate_host']:>6.3f}"
                f"{row['written_bytes'] / 1e9:>9.2f}{row['loaded_bytes'] / 1e9:>5.2f}"
            )
        lines += _failed(found["failed"])
    lines += _failed(report.get("failed_servers", {}))
    if not report.get("cuda_graphs"):
        lines.append("decode steps without CUDA graphs")
    return lines


def _failed(servers: Mapping[str, str]) -> list[str]:
    return [f"{name} FAILED {reason(text):.100}" for name, text in servers.items()]
