"""Multi-turn load against a running server's ``/generate``.

Takes the flags of SGLang's HiCache multi-turn benchmark. Each client holds one
conversation; a round sends the whole history and a new question. Prompts are random
token ids, so a server is needed, but no tokenizer.

    python -m launch.bench.multiturn --model-path MODEL --port 30000 --num-clients 8
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import socket
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from launch.server import ONE_EACH
from sglang_ext.arguments import Parser, number, output_file, port, whole
from sglang_ext.sizing.traffic import Chat, Session, Turn

_CONNECT_S = 10.0
AUTO_RUN_RATES = (16, 14, 12, 10, 8, 6, 4, 2, 1)
"""Request rates tried one after the other unless ``--disable-auto-run``."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=None, help="for its vocabulary size")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=30000)
    parser.add_argument("--num-clients", type=whole(1), default=256)
    parser.add_argument("--num-rounds", type=whole(1), default=5)
    parser.add_argument("--max-parallel", type=whole(1), default=128)
    parser.add_argument("--request-length", type=whole(1), default=512, help="tokens of a question")
    parser.add_argument("--output-length", type=whole(1), default=64, help="tokens of an answer")
    parser.add_argument(
        "--sub-question-input-length",
        type=whole(0),
        default=0,
        help="tokens of every question but the first; 0 means --request-length",
    )
    parser.add_argument(
        "--request-rate", type=number(above=0), default=1.0, help="requests per second"
    )
    parser.add_argument("--distribution", choices=["poisson", "uniform"], default="poisson")
    parser.add_argument("--ready-queue-policy", choices=["random", "fifo"], default="random")
    parser.add_argument(
        "--disable-random-sample",
        action="store_true",
        help="every question has its full length; otherwise between half and all of it",
    )
    parser.add_argument(
        "--disable-auto-run",
        action="store_true",
        help=f"run once at --request-rate instead of at each of {AUTO_RUN_RATES}",
    )
    parser.add_argument(
        "--enable-round-barrier",
        action="store_true",
        help="no client starts a round before all have ended the one before",
    )
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--tag", default="", help="copied into the result")
    parser.add_argument("--log-file", type=output_file, default=Path("performance_metrics.jsonl"))
    return parser.parse_args(argv)


@dataclasses.dataclass
class Sample:
    """One request. Times in seconds, sizes in tokens.

    Attributes:
        gaps: between one piece of the answer and the next, which is a token unless the server
            was started with a longer ``--stream-interval``.
    """

    round: int
    prompt: int
    output: int
    device: int
    host: int
    storage: int
    ttft: float
    latency: float
    gaps: tuple[float, ...] = ()


class Client:
    """One conversation.

    Attributes:
        turn: what it sends next; None when it has ended.
        round: number of that.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.turn: Turn | None = next(session)
        self.round = 0

    def told(self, answer: Sequence[int]) -> None:
        """Go on with the answer."""
        self.round += 1
        try:
            self.turn = self._session.send(np.array(answer, dtype=np.int64))
        except StopIteration:
            self.turn = None


def vocabulary_size(model_path: str | None) -> int:
    """From the model's configuration; a size that every model has without one."""
    config = Path(model_path or "") / "config.json"
    if model_path and config.exists():
        data = json.loads(config.read_text())
        return int(data.get("vocab_size") or data.get("text_config", {}).get("vocab_size", 10000))
    return 10000


def make_clients(args: argparse.Namespace) -> list[Client]:
    """Conversations with their questions; the same for the same seed and lengths."""

    def span(longest: int) -> tuple[int, int]:
        return (longest if args.disable_random_sample else max(1, longest // 2)), longest

    chat = Chat(
        args.num_clients,
        args.num_rounds,
        system=0,
        first=span(args.request_length),
        question=span(args.sub_question_input_length or args.request_length),
        answer=(args.output_length, args.output_length),
    )
    vocabulary = vocabulary_size(args.model_path)
    return [Client(chat.session(n, vocabulary, args.seed)) for n in range(args.num_clients)]


class ReadyQueue:
    """Clients with a question to send."""

    def __init__(self, policy: str, seed: int) -> None:
        self._policy = policy
        self._rng = random.Random(seed)
        self._clients: deque[Client] = deque()
        self._arrived = asyncio.Event()

    def put(self, client: Client) -> None:
        """A client becomes ready."""
        self._clients.append(client)
        self._arrived.set()

    async def get(self) -> Client:
        """The next client to serve."""
        while not self._clients:
            self._arrived.clear()
            await self._arrived.wait()
        if self._policy == "random":
            self._clients.rotate(-self._rng.randrange(len(self._clients)))
        return self._clients.popleft()


async def generate(http: httpx.AsyncClient, client: Client) -> Sample:
    """Send one round of a client and measure it."""
    assert client.turn is not None
    body = {
        "input_ids": client.turn.prompt.tolist(),
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": client.turn.answer,
            "ignore_eos": True,
        },
        "stream": True,
    }
    start = time.perf_counter()
    arrived: list[float] = []
    last: dict[str, Any] = {}
    output: list[int] = []
    async with http.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            arrived.append(time.perf_counter())
            last = json.loads(line[len("data:") :])
            if "error" in last:
                raise RuntimeError(last["error"])
            # chunks are cumulative or incremental, as the server was started
            ids = last["output_ids"]
            output = ids if len(ids) >= last["meta_info"]["completion_tokens"] else output + ids
    meta = last["meta_info"]
    tiers = meta.get("cached_tokens_details") or {}
    sample = Sample(
        round=client.round,
        prompt=meta["prompt_tokens"],
        output=meta["completion_tokens"],
        device=tiers.get("device", 0),
        host=tiers.get("host", 0),
        storage=tiers.get("storage", 0),
        ttft=arrived[0] - start,
        latency=time.perf_counter() - start,
        gaps=tuple(after - before for before, after in itertools.pairwise(arrived)),
    )
    client.told(output)
    return sample


async def run_load(args: argparse.Namespace, rate: float) -> tuple[list[Sample], float]:
    """All clients, all rounds, once. Returns the samples and the wall time in seconds."""
    url = f"http://{args.host}:{args.port}"
    clients = make_clients(args)
    queue = ReadyQueue(args.ready_queue_policy, args.seed)
    pace = random.Random(args.seed)
    slots = asyncio.Semaphore(args.max_parallel)
    total = args.num_clients * args.num_rounds
    samples: list[Sample] = []
    waiting: list[Client] = []

    def next_round(client: Client) -> None:
        if client.turn is None:
            return
        if not args.enable_round_barrier:
            queue.put(client)
            return
        waiting.append(client)
        if len(waiting) == args.num_clients:
            for ready in waiting:
                queue.put(ready)
            waiting.clear()

    async def serve(http: httpx.AsyncClient, client: Client, bar: tqdm) -> None:
        try:
            samples.append(await generate(http, client))
        finally:
            slots.release()
        bar.update()
        next_round(client)

    start = time.perf_counter()
    with tqdm(total=total, desc=args.tag or f"{rate:g} req/s", unit="req") as bar:
        async with (
            httpx.AsyncClient(
                base_url=url, timeout=None, limits=ONE_EACH, trust_env=False, verify=False
            ) as http,
            # a failed request ends the run: it cancels this loop and the other requests
            asyncio.TaskGroup() as requests,
        ):
            for client in clients:
                queue.put(client)
            for _ in range(total):
                client = await queue.get()
                await slots.acquire()
                requests.create_task(serve(http, client, bar))
                poisson = args.distribution == "poisson"
                await asyncio.sleep(pace.expovariate(rate) if poisson else 1.0 / rate)
    return samples, time.perf_counter() - start


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles."""
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}


def summarize(samples: Sequence[Sample], wall_s: float) -> dict[str, Any]:
    """Latency, throughput and hit rates, over all rounds and for each."""
    by_round: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_round[sample.round].append(sample)

    def hits(part: Sequence[Sample]) -> dict[str, float]:
        prompt = max(1, sum(s.prompt for s in part))
        rates = {
            tier: sum(getattr(s, tier) for s in part) / prompt
            for tier in ("device", "host", "storage")
        }
        return {"total": sum(rates.values()), **rates}

    prompt = sum(s.prompt for s in samples)
    output = sum(s.output for s in samples)
    return {
        "requests": len(samples),
        "wall_s": wall_s,
        "ttft_s": distribution([s.ttft for s in samples]),
        "latency_s": distribution([s.latency for s in samples]),
        "itl_s": distribution([gap for s in samples for gap in s.gaps]),
        "throughput": {
            "requests_per_s": len(samples) / wall_s,
            "input_tokens_per_s": prompt / wall_s,
            "output_tokens_per_s": output / wall_s,
        },
        "prompt_tokens": prompt,
        "output_tokens": output,
        "hit_rate": hits(samples),
        "rounds": [
            {"round": n, "hit_rate": hits(part), "ttft_s": distribution([s.ttft for s in part])}
            for n, part in sorted(by_round.items())
        ],
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the load, append a JSON line for each run to the log file, print a summary."""
    args = parse_args(argv)
    # before anything is made and drawn for it
    socket.create_connection((args.host, args.port), timeout=_CONNECT_S).close()
    rates = [args.request_rate] if args.disable_auto_run else list(AUTO_RUN_RATES)
    results = []
    for rate in rates:
        samples, wall_s = asyncio.run(run_load(args, rate))
        result = {
            "tag": args.tag,
            "request_rate": rate,
            **summarize(samples, wall_s),
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        }
        args.log_file.parent.mkdir(parents=True, exist_ok=True)
        with args.log_file.open("a") as log:
            log.write(json.dumps(result) + "\n")
        ttft, hit = result["ttft_s"], result["hit_rate"]
        print(
            f"rate {rate:g}: TTFT mean {ttft['mean']:.3f} s, p99 {ttft['p99']:.3f} s; "
            f"{result['throughput']['input_tokens_per_s']:.0f} input tokens/s; "
            f"hit rate {hit['total']:.3f} (device {hit['device']:.3f}, host {hit['host']:.3f})"
        )
        results.append(result)
    return results


def run_or_say_why(argv: Sequence[str] | None = None) -> int:
    """``main`` as a command: what the server does wrong is one line; returns the exit status."""
    args, status = parse_args(argv), 0
    try:
        main(argv)
    except* (httpx.HTTPError, OSError, RuntimeError, ValueError, KeyError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"the server at {args.host}:{args.port}: {said:.200}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(run_or_say_why())
