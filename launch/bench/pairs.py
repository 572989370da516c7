"""Ours beside stock under the same load, in turns, on servers that are all up at once.

Only one server runs at a time, the others are stopped (SIGSTOP), so a turn of each is measured
under the same conditions and what the machine does otherwise hits all of them. Ratios are taken
turn by turn; the report has their medians.

    python -m launch.bench.pairs --shape no-reuse --out out/no_reuse.json
    python -m launch.bench.pairs --shape multi-turn --out out/multi_turn.json
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
from launch.models import tiny
from launch.server import CPU, OURS, Server, running
from sglang_ext.arguments import Parser, output_file, whole

ROOT = Path(__file__).resolve().parents[2]
HOST_TIER = ("--enable-hierarchical-cache", "--hicache-write-policy", "write_through")
STOCK, STOCK_HOST, OURS_HOST = "stock, device only", "stock + HiCache", "ours, device + host"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A load and the servers that get it.

    Attributes:
        servers: engine options by name; the last one is ours.
        load: flags of ``launch.bench.multiturn``.
        device_tokens: size of the device pool.
        turns: of each server that count.
        warm_up: turns before those, until what a turn costs is what it goes on to cost.
    """

    servers: Mapping[str, Sequence[str]]
    load: Mapping[str, int]
    device_tokens: int
    turns: int
    warm_up: int


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
        scheduler ran, and seconds of the passes."""
        lines = self._steps.read_text().splitlines()
        new, self._lines_before = lines[self._lines_before :], len(lines)
        return np.array([[float(word) for word in line.split()] for line in new])


def measure(paused: PausedServer, shape: Shape, model: Path, seed: int) -> dict[str, float]:
    """One turn of one server."""
    flags = {
        "--model-path": model,
        "--port": paused.server.port,
        "--seed": seed,
        "--request-rate": 1000,
        "--ready-queue-policy": "fifo",
        **{f"--{name}": value for name, value in shape.load.items()},
    }
    listed = [str(item) for pair in flags.items() for item in pair]
    args = multiturn.parse_args([*listed, "--disable-random-sample", "--disable-auto-run"])
    with paused.awake():
        samples, wall = asyncio.run(multiturn.run_load(args, args.request_rate))
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


def run(args: argparse.Namespace, model: Path, folder: Path) -> list[dict[str, Any]]:
    """All turns of a shape: what each server did in each of them."""
    shape = SHAPES[args.shape]
    options = [
        *("--model-path", str(model), "--dtype", "float32", "--page-size", str(args.page)),
        *("--max-total-tokens", str(shape.device_tokens), "--mem-fraction-static", "0.3"),
        *("--chunked-prefill-size", "512", "--max-running-requests", "8"),
        *("--hicache-io-backend", "direct", "--sleep-on-idle"),
    ]
    turns: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        servers: dict[str, PausedServer] = {}
        for name, own in shape.servers.items():
            stem = folder / name.replace(",", "").replace(" ", "_")
            steps = stem.with_suffix(".steps")
            print(f"starting the server: {name}", flush=True)
            environment = {**CPU, "EXT_CPU_STEP_TIMES": str(steps)}
            server = stack.enter_context(
                running([*options, *own], stem.with_suffix(".log"), environment)
            )
            servers[name] = PausedServer(server, steps)
            # awake when it is told to end
            stack.callback(os.killpg, server.process.pid, signal.SIGCONT)
            servers[name].pause()
        count = args.turns or shape.turns
        for turn in tqdm(range(shape.warm_up + count), desc="turns"):
            # whoever goes first in one turn goes last in the next
            order = list(servers) if turn % 2 else list(servers)[::-1]
            done = {name: measure(servers[name], shape, model, turn) for name in order}
            if turn >= shape.warm_up:
                turns.append({name: done[name] for name in servers})
    return turns


def main() -> None:
    """Measure one shape, print the medians, write everything."""
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = ROOT / ".models" / "small-128"
    if not (model / "model.safetensors").exists():
        tiny.make_model(
            tiny.parse_args(["--out", str(model), "--size", "small", "--window", "128"])
        )
    turns = run(args, model, args.out.parent)
    report = {
        "versions": {n: importlib.metadata.version(n) for n in ("sglang", "torch", "numba")},
        "shape": args.shape,
        "load": dict(SHAPES[args.shape].load),
        "device_tokens": SHAPES[args.shape].device_tokens,
        "page": args.page,
        **compare(turns),
        "turns": turns,
    }
    args.out.write_text(json.dumps(report, indent=1))
    for name, values in report["median"].items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    for name, values in report["ours_to"].items():
        print(f"ours to {name}", {key: round(value, 3) for key, value in values.items()})
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
