"""The same multi-turn load on stock SGLang and on ours, side by side.

Makes a model, starts three servers (the engine's own cache, without a host tier and with its
HiCache; our cache with as much host memory), prints one table, writes ``out/demo.json`` and
``out/demo.png``.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import multiturn
from launch.bench.pairs import HOST_TIER, OURS_HOST, STOCK, STOCK_HOST
from launch.models import tiny
from launch.server import (
    CPU,
    OURS,
    Server,
    ServerError,
    explained_by,
    start,
    wait_until_ready,
)
from sglang_ext.arguments import Parser, output_folder, whole

ROOT = Path(__file__).resolve().parent.parent
DEVICE_TOKENS = 8192
"""Device pool, about a third of what the conversations need."""
SERVER = (
    *("--dtype", "float32", "--page-size", "64", "--max-total-tokens", str(DEVICE_TOKENS)),
    *("--mem-fraction-static", "0.5", "--chunked-prefill-size", "1024"),
    *("--max-running-requests", "8", "--hicache-io-backend", "direct"),
    "--sleep-on-idle",
)
CONFIGURATIONS = {
    STOCK: (),
    STOCK_HOST: (*HOST_TIER, "--hicache-ratio", "2"),
    OURS_HOST: (*OURS, *HOST_TIER, "--hicache-ratio", "2"),
}
"""Host tiers are of the same size, in bytes: twice the device pools."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults take a few minutes on two cores."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_folder, default=ROOT / "out")
    parser.add_argument("--num-clients", type=whole(1), default=16)
    parser.add_argument("--num-rounds", type=whole(1), default=5)
    parser.add_argument("--request-length", type=whole(1), default=256)
    parser.add_argument("--output-length", type=whole(1), default=16)
    return parser.parse_args(argv)


def load_arguments(args: argparse.Namespace, model: Path, port: int, tag: str) -> list[str]:
    """Flags of the load: everything is ready at once, eight requests at a time."""
    flags = {
        "--model-path": model,
        "--port": port,
        "--num-clients": args.num_clients,
        "--num-rounds": args.num_rounds,
        "--request-length": args.request_length,
        "--output-length": args.output_length,
        "--max-parallel": 8,
        "--request-rate": 1000,
        "--ready-queue-policy": "fifo",
        "--tag": tag,
        "--log-file": args.out / "demo_runs.jsonl",
    }
    listed = [str(item) for pair in flags.items() for item in pair]
    return [*listed, "--disable-random-sample", "--disable-auto-run", "--enable-round-barrier"]


def start_server(args: argparse.Namespace, model: Path, name: str) -> Server:
    """A server of one configuration, which has only begun to start."""
    log = args.out / f"server_{'_'.join(re.findall('[a-z]+', name.lower()))}.log"
    print(f"starting the server: {name}", flush=True)
    arguments = ["--model-path", str(model), *SERVER, *CONFIGURATIONS[name]]
    return start(arguments, log, CPU)


def measure(args: argparse.Namespace, model: Path, name: str, server: Server) -> dict[str, Any]:
    """What the load does on a server."""
    result: dict[str, Any] = multiturn.main(load_arguments(args, model, server.port, name))[0]
    for where in ("host", "port", "model_path", "log_file"):  # of this machine alone
        del result["arguments"][where]
    return result


def run(args: argparse.Namespace, model: Path) -> dict[str, dict[str, Any]]:
    """The load on a fresh server of each configuration, one after the other.

    A start imports for half a minute, on one core at a time: so they all start at once, and wait
    for their turn asleep.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in CONFIGURATIONS:
            servers[name] = start_server(args, model, name)
            stack.callback(servers[name].stop)
        for name, server in servers.items():
            try:
                wait_until_ready(server)
            except ServerError as error:
                sys.exit(f"{name}: {str(error).partition(':')[0]}; see {server.log}")
        results = {}
        for name, server in servers.items():
            with explained_by(server):
                results[name] = measure(args, model, name, server)
    return results


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Rows of figures, one column for each configuration, and the ratio of the last two."""
    names = list(results)
    rows = [
        ("hit rate", lambda r: r["hit_rate"]["total"], "{:.3f}"),
        ("  from the device", lambda r: r["hit_rate"]["device"], "{:.3f}"),
        ("  from the host", lambda r: r["hit_rate"]["host"], "{:.3f}"),
        ("TTFT mean, s", lambda r: r["ttft_s"]["mean"], "{:.3f}"),
        ("TTFT p50, s", lambda r: r["ttft_s"]["p50"], "{:.3f}"),
        ("TTFT p99, s", lambda r: r["ttft_s"]["p99"], "{:.3f}"),
        ("latency mean, s", lambda r: r["latency_s"]["mean"], "{:.3f}"),
        ("input tokens/s", lambda r: r["throughput"]["input_tokens_per_s"], "{:.0f}"),
        ("output tokens/s", lambda r: r["throughput"]["output_tokens_per_s"], "{:.1f}"),
        ("wall time, s", lambda r: r["wall_s"], "{:.1f}"),
    ]
    print(f"\n{'':22}" + "".join(f"{name:>22}" for name in names) + f"{'ours / HiCache':>16}")
    for label, pick, form in rows:
        values = [pick(results[name]) for name in names]
        ratio = f"{values[-1] / values[-2]:.2f}" if values[-2] else "-"
        print(f"{label:22}" + "".join(f"{form.format(v):>22}" for v in values) + f"{ratio:>16}")


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Hit rate and mean TTFT by round."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, result in results.items():
        rounds = [r["round"] + 1 for r in result["rounds"]]
        left.plot(rounds, [r["hit_rate"]["total"] for r in result["rounds"]], "o-", label=name)
        right.plot(rounds, [r["ttft_s"]["mean"] for r in result["rounds"]], "o-", label=name)
    left.set(title="Prompt tokens served from cache", xlabel="round", ylim=(0, 1))
    right.set(title="Mean time to first token, s", xlabel="round")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_xticks(rounds)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make the model, run the configurations, report."""
    args = parse_args()
    model = ROOT / ".models" / "small-128"
    if not (model / "model.safetensors").exists():
        print("making the model", flush=True)
        tiny.make_model(
            tiny.parse_args(["--out", str(model), "--size", "small", "--window", "128"])
        )
    results = run(args, model)
    print_table(results)
    (args.out / "demo.json").write_text(json.dumps(results, indent=2))
    plot(results, args.out / "demo.png")
    print(f"\nwritten: {args.out / 'demo.json'}, {args.out / 'demo.png'}")


if __name__ == "__main__":
    main()
