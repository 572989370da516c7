"""Ours beside stock under the same load, in turns, on servers that are all up at once.

Only one server runs at a time, the others are stopped (SIGSTOP), so a turn of each is measured
under the same conditions and what the machine does otherwise hits all of them. Ratios are taken
turn by turn; the report has their medians.

    python -m launch.bench.pairs --shape no-reuse --out out/no_reuse.json
    python -m launch.bench.pairs --shape multi-turn --out out/multi_turn.json
    python -m launch.bench.pairs --shape host-size --out out/host_size.json
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch.bench import multiturn
from launch.bench.metrics import metric
from launch.models import tiny
from launch.server import CPU, OURS, Server, running
from sglang_ext.arguments import Parser, output_file, whole

ROOT = Path(__file__).resolve().parents[2]
HOST_TIER = ("--enable-hierarchical-cache", "--hicache-write-policy", "write_through")
STOCK, STOCK_HOST, OURS_HOST = "stock, device only", "stock + HiCache", "ours, device + host"
OURS_SMALL, OURS_LARGE = "ours, 2000 host pages", "ours, 100000 host pages"
GROWTH = 0.005
"""Part of a host that a load adds at least while the host is not full. It is never full to the
last page: pages of our two components leave holes, and stock frees whole nodes."""
FIRST_FILLER = 1_000_000
"""Seed of the first load that fills a host; turns have theirs from 0 on."""
HOST_METRICS = {
    "used_tokens": ("sglang:hicache_host_used_tokens", ""),
    "total_tokens": ("sglang:hicache_host_total_tokens", ""),
    "full_bytes": ("sglang_ext:host_memory_bytes", 'use="full"'),
    "window_bytes": ("sglang_ext:host_memory_bytes", 'use="window"'),
    "hole_bytes": ("sglang_ext:host_memory_bytes", 'use="holes"'),
    "free_bytes": ("sglang_ext:host_memory_bytes", 'use="free"'),
}
"""What is known of a host: (metric, label). Of ours, tokens count both components in tokens of
full-attention KV; of stock, full attention alone. Only ours tells bytes."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A load and the servers that get it.

    Attributes:
        servers: engine options by name; the last one is ours.
        load: flags of ``launch.bench.multiturn``.
        device_tokens: size of the device pool.
        turns: of each server that count.
        warm_up: turns before those, until what a turn costs is what it goes on to cost.
        model: preset of ``launch.models.tiny``.
        chunk: most tokens of a prefill.
        options: of all servers, beside those that every shape has.
        filler: a load that each server with a host gets, with another seed each time, until the
            host is full; empty if the host may be as it is.
    """

    servers: Mapping[str, Sequence[str]]
    load: Mapping[str, int]
    device_tokens: int
    turns: int
    warm_up: int
    model: str = "small"
    chunk: int = 512
    options: Sequence[str] = ()
    filler: Mapping[str, int] = dataclasses.field(default_factory=dict)


SHAPES = {
    # no prompt comes twice: what the cache costs where it is of no use
    "no-reuse": Shape(
        {STOCK: (), OURS_HOST: (*OURS, *HOST_TIER, "--hicache-ratio", "2")},
        {
            "num-clients": 16,
            "num-rounds": 1,
            "max-parallel": 8,
            "request-length": 1024,
            "output-length": 16,
        },
        device_tokens=16384,  # twice what the requests that run together take
        turns=9,
        warm_up=6,  # the host has been filled and has turned over
    ),
    "multi-turn": Shape(
        {
            STOCK: (),
            STOCK_HOST: (*HOST_TIER, "--hicache-ratio", "2"),
            OURS_HOST: (*OURS, *HOST_TIER, "--hicache-ratio", "2"),
        },
        {
            "num-clients": 12,
            "num-rounds": 5,
            "max-parallel": 4,
            "request-length": 256,
            "output-length": 16,
        },
        device_tokens=4096,  # what the requests that run together take
        turns=5,
        warm_up=1,
    ),
    # what a full host of very many pages costs: matches, inserts, evictions and copies both ways
    # are as many with either host, since a turn fits into the smaller one
    "host-size": Shape(
        {
            STOCK: (),
            STOCK_HOST: (*HOST_TIER, "--hicache-ratio", "390.625"),
            OURS_SMALL: (*OURS, *HOST_TIER, "--hicache-ratio", "7.8125"),
            OURS_LARGE: (*OURS, *HOST_TIER, "--hicache-ratio", "390.625"),
        },
        {
            "num-clients": 64,
            "num-rounds": 5,
            "max-parallel": 16,  # as many wait as run, so passes do not depend on the client
            "request-length": 256,
            "output-length": 16,
        },
        device_tokens=16384,  # 256 pages of 64, a fifth of what a turn's conversations take
        turns=7,
        warm_up=2,
        model="narrow",
        chunk=4096,
        # passes take a few milliseconds: the client must not be what they wait for
        options=("--enable-metrics", "--stream-interval", "16"),
        filler={
            "num-clients": 250,
            "num-rounds": 1,
            "max-parallel": 32,
            "request-length": 1024,
            "output-length": 1,
        },
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="multi-turn")
    parser.add_argument("--turns", type=whole(1), help="instead of the shape's")
    parser.add_argument("--page", type=whole(1), default=64)
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "pairs.json")
    return parser.parse_args(argv)


class PausedServer:
    """A server that runs only inside ``awake``."""

    def __init__(self, server: Server, steps: Path) -> None:
        self.server = server
        self._steps = steps
        self._lines_before = 0

    def pause(self) -> None:
        """Stop its processes."""
        os.killpg(self.server.process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for the length of a with-block."""
        os.killpg(self.server.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def new_steps(self) -> np.ndarray:
        """(n, 3) since the last call: seconds between forward passes, those of them that the
        scheduler ran, and seconds of the passes. Without the first: a server that was paused
        before it was idle counts the pause there."""
        lines = self._steps.read_text().splitlines()
        new, self._lines_before = lines[self._lines_before + 1 :], len(lines)
        return np.array([[float(word) for word in line.split()] for line in new])


def send(
    server: Server,
    load: Mapping[str, int],
    model: Path,
    seed: int,
    limit_s: float | None = None,
) -> tuple[list[multiturn.Sample], float]:
    """A load with as much in parallel as it says: the samples and the wall time in seconds.

    Raises:
        TimeoutError: not all is answered after ``limit_s`` seconds.
    """
    flags = {
        "--model-path": model,
        "--port": server.port,
        "--seed": seed,
        "--request-rate": 1000,
        "--ready-queue-policy": "fifo",
        **{f"--{name}": value for name, value in load.items()},
    }
    listed = [str(item) for pair in flags.items() for item in pair]
    args = multiturn.parse_args([*listed, "--disable-random-sample", "--disable-auto-run"])
    return asyncio.run(asyncio.wait_for(multiturn.run_load(args, args.request_rate), limit_s))


def host_use(server: Server) -> dict[str, float]:
    """What the server's metrics say of its host, and the part of it that is in use."""
    text = server.get("/metrics")
    found = {key: metric(text, *name) for key, name in HOST_METRICS.items()}
    total = found["total_tokens"]
    return {"used": found["used_tokens"] / total if total else 0.0, **found}


def fill(server: Server, shape: Shape, model: Path) -> dict[str, float]:
    """Send prompts that nobody asks for again until the host holds no more for them; without a
    host, once.

    Returns:
        How many, and how full the host is.
    """
    loads, before, use = 0, -1.0, host_use(server)
    while use["used"] - before > GROWTH:
        before = use["used"]
        send(server, shape.filler, model, FIRST_FILLER + loads)
        loads += 1
        use = host_use(server)
    return {"prompts": loads * shape.filler["num-clients"], **use}


def measure(paused: PausedServer, shape: Shape, model: Path, seed: int) -> dict[str, float]:
    """One turn of one server."""
    with paused.awake():
        samples, wall = send(paused.server, shape.load, model, seed)
    result = multiturn.summarize(samples, wall)
    between, running, forward = paused.new_steps().T
    return {
        "input_tokens_per_s": result["throughput"]["input_tokens_per_s"],
        "ttft_mean_s": result["ttft_s"]["mean"],
        "ttft_p99_s": result["ttft_s"]["p99"],
        "hit_rate": result["hit_rate"]["total"],
        "host_hit_rate": result["hit_rate"]["host"],
        "steps": len(between),
        "between_steps_mean_us": float(between.mean() * 1e6),
        "between_steps_p50_us": float(np.median(between) * 1e6),
        "running_between_steps_mean_us": float(running.mean() * 1e6),
        "running_between_steps_p50_us": float(np.median(running) * 1e6),
        "between_per_request_us": float(between.sum() * 1e6 / len(samples)),
        "running_between_per_request_us": float(running.sum() * 1e6 / len(samples)),
        "forward_s": float(forward.sum()),
    }


def compare(turns: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Medians of each server, and of ours to each other one, turn by turn."""
    names = list(turns[0])
    keys = list(turns[0][names[0]])
    ours = names[-1]

    def ratio(turn: Mapping[str, Mapping[str, float]], key: str, name: str) -> float | None:
        return turn[ours][key] / turn[name][key] if turn[name][key] else None

    return {
        "median": {
            name: {key: statistics.median(turn[name][key] for turn in turns) for key in keys}
            for name in names
        },
        "ours_to": {
            name: {
                key: statistics.median(found)
                for key in keys
                if (found := [r for turn in turns if (r := ratio(turn, key, name)) is not None])
            }
            for name in names[:-1]
        },
    }


def run(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """All turns of a shape: what each server did in each of them, and how full a host that has
    been filled was before the first and after the last."""
    shape = SHAPES[args.shape]
    options = [
        *("--model-path", str(model), "--dtype", "float32", "--page-size", str(args.page)),
        *("--max-total-tokens", str(shape.device_tokens), "--mem-fraction-static", "0.3"),
        *("--chunked-prefill-size", str(shape.chunk), "--max-running-requests", "8"),
        *("--hicache-io-backend", "direct", "--sleep-on-idle"),
        *shape.options,
    ]
    turns: list[dict[str, Any]] = []
    hosts: dict[str, dict[str, dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        servers: dict[str, PausedServer] = {}
        for name, own in shape.servers.items():
            stem = folder / name.replace(",", "").replace(" ", "_")
            steps = stem.with_suffix(".steps")
            print(f"starting the server: {name}", flush=True)
            # a pass that computes on all cores has to share them with copies to the host, which
            # a GPU does by itself
            environment = {**CPU, "OMP_NUM_THREADS": "1", "EXT_CPU_STEP_TIMES": str(steps)}
            server = stack.enter_context(
                running([*options, *own], stem.with_suffix(".log"), environment)
            )
            servers[name] = PausedServer(server, steps)
            # awake when it is told to end
            stack.callback(os.killpg, server.process.pid, signal.SIGCONT)
            if shape.filler:
                hosts[name] = {"before": fill(server, shape, model)}
                print(name, hosts[name]["before"], flush=True)
                servers[name].new_steps()
            servers[name].pause()
        count = args.turns or shape.turns
        for turn in tqdm(range(shape.warm_up + count), desc="turns"):
            # whoever goes first in one turn goes last in the next
            order = list(servers) if turn % 2 else list(servers)[::-1]
            done = {name: measure(servers[name], shape, model, turn) for name in order}
            if turn >= shape.warm_up:
                turns.append({name: done[name] for name in servers})
        for name, paused in servers.items():
            if shape.filler:
                with paused.awake():
                    hosts[name]["after"] = host_use(paused.server)
    return {**({"hosts": hosts} if hosts else {}), **compare(turns), "turns": turns}


def main() -> None:
    """Measure one shape, print the medians, write everything."""
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    model = ROOT / ".models" / f"{shape.model}-128"
    if not (model / "model.safetensors").exists():
        options = ["--out", str(model), "--size", shape.model, "--window", "128"]
        tiny.make_model(tiny.parse_args(options))
    report = {
        "versions": {n: importlib.metadata.version(n) for n in ("sglang", "torch", "numba")},
        "shape": args.shape,
        "load": dict(shape.load),
        "device_tokens": shape.device_tokens,
        "page": args.page,
        **run(args, model, args.out.parent),
    }
    args.out.write_text(json.dumps(report, indent=1))
    for name, values in report["median"].items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    for name, values in report["ours_to"].items():
        print(f"ours to {name}", {key: round(value, 3) for key, value in values.items()})
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
