"""SIGKILL of a server while it writes to storage, again and again; the next one must be right.

Every server goes on with the directory that the one before has left. It answers requests with known
answers, token by token, and is killed with all its processes at a random moment.

    python -m tests.soak.kill --kills 100 --out out/soak_kill.json
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from launch.bench.metrics import metric
from launch.models.tiny import ready_made
from launch.server import OURS, STRICT_CHECKS, Server, ServerError, wait_until_ready
from launch.traffic import Traffic, generate
from sglang_ext.arguments import Parser, output_file, whole
from tests.fixtures.zygote import Zygote
from tests.soak.traffic import Picker, Pool, ask

ROOT = Path(__file__).resolve().parents[2]
TRAFFIC = Traffic(conversations=24, rounds=4, parallel=8, seed=41)
WINDOW, CLIENTS = 128, 4
STORED_BYTES = 6_000_000
LONGEST_S = 4.0
"""A server is killed at a moment in this time after its first answer."""
COMMON = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--skip-server-warmup"),
    *("--hicache-io-backend", "direct", "--page-size", "16", "--max-running-requests", "8"),
    *("--enable-metrics",),
)


def options(directory: Path) -> list[str]:
    """Of a server with a device that holds a few conversations, and storage in files that holds
    about a third of them: there is always something to write, and to remove."""
    settings = {
        "file_storage_path": str(directory),
        "prefetch_threshold": 16,
        "max_size": STORED_BYTES,
    }
    return [
        *("--model-path", str(ready_made(WINDOW)), *COMMON, *OURS, "--max-total-tokens", "4096"),
        *("--enable-hierarchical-cache", "--hicache-ratio", "1.5"),
        *("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "timeout"),
        *("--hicache-storage-backend-extra-config", json.dumps(settings)),
    ]


def serve_until_killed(server: Server, pool: Pool, seed: int) -> Counter[str]:
    """Clients send requests; after a while the server is killed. What has happened, counted."""
    counts: Counter[str] = Counter()
    picker, stop = Picker(pool, seed), threading.Event()

    def client() -> None:
        while not stop.is_set():
            request = picker.pick().request
            try:
                result = generate(server, request.prompt, len(request.answer), timeout_s=60.0)
            except (httpx.HTTPError, ValueError):
                if not stop.is_set():
                    counts["failed before the kill"] += 1
                return
            counts["answers"] += 1
            counts["different"] += result["output_ids"] != request.answer
            details = result["meta_info"]["cached_tokens_details"] or {}
            counts["tokens from storage"] += details.get("storage", 0)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    deadline = time.monotonic() + 60.0
    while counts["answers"] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(random.Random(seed).uniform(0.0, LONGEST_S))
    text = server.get("/metrics")
    for event in ("damaged", "foreign", "failed"):
        counts[f"files {event}"] += int(
            metric(text, "sglang_ext:storage_files_total", f'event="{event}"')
        )
    for event in ("persisted", "prefetched"):
        counts[event] += int(metric(text, "sglang_ext:kv_tokens_total", f'event="{event}"'))
    stop.set()
    kill(server)
    for thread in clients:
        thread.join()
    return counts


def known_answers(zygote: Zygote, log: Path) -> Pool:
    """Answers of a server without a prefix cache."""
    arguments = ["--model-path", str(ready_made(WINDOW)), *COMMON, "--disable-radix-cache"]
    server = zygote.start([*arguments, "--max-total-tokens", "16384"], log, STRICT_CHECKS)
    try:
        wait_until_ready(server)
        return ask(server, TRAFFIC)
    finally:
        kill(server)


def kill(server: Server) -> None:
    """SIGKILL of a server with all its processes."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=whole(1), default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=output_file, default=ROOT / "out" / "soak_kill.json")
    return parser.parse_args(argv)


def main() -> int:
    """Run it; exit status 0 if every answer was right."""
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    zygote = Zygote()
    folder = Path(tempfile.mkdtemp(prefix="soak-kill-"))
    pool = known_answers(zygote, folder / "reference.log")
    total: Counter[str] = Counter()
    for number in range(args.kills):
        server = zygote.start(options(folder / "pages"), folder / "server.log", STRICT_CHECKS)
        try:
            wait_until_ready(server)
            total += serve_until_killed(server, pool, args.seed * 1000 + number)
            total["kills"] += 1
        except ServerError as error:
            total["did not start"] += 1
            print(error, flush=True)
        print(number + 1, dict(total), flush=True)
        args.out.write_text(json.dumps(report(args, total), indent=1) + "\n")
    zygote.close()
    shutil.rmtree(folder)
    bad = total["different"] + total["did not start"] + total["failed before the kill"]
    return 1 if bad or not total["tokens from storage"] else 0


def report(args: argparse.Namespace, total: Counter[str]) -> dict[str, Any]:
    """What is written to the file."""
    return {"seed": args.seed, "clients": CLIENTS, "longest_s": LONGEST_S, **total}


if __name__ == "__main__":
    raise SystemExit(main())
