"""A finite pool of multi-turn requests with known answers, and who sends which one next."""

import dataclasses
import hashlib
import json
import os
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.server import Server


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Shape of the pool. Lengths in tokens; ``fork`` is the chance that a round
    restarts from a random point of the history instead of its end.

    Tokens whose log-probabilities are closer than ``tie`` may swap with the order of the
    additions, which depends on how prompts were cut and batched. A cache is not to blame
    for that, so rounds with such an answer are not part of the pool.
    """

    conversations: int = 48
    rounds: int = 5
    shared: int = 150
    first: tuple[int, int] = (120, 360)
    question: tuple[int, int] = (20, 90)
    answer: tuple[int, int] = (8, 40)
    fork: float = 0.15
    vocabulary: int = 512
    tie: float = 1e-4
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One round of a conversation: what is sent and what must come back."""

    name: str
    prompt: list[int]
    answer: list[int]


Pool = list[list[Request]]
"""Requests by conversation and round."""


def generate(
    server: Server, prompt: Sequence[int], length: int, timeout_s: float = 600.0, **fields: Any
) -> dict[str, Any]:
    """One greedy request of exactly ``length`` tokens; ``fields`` go into it as they are."""
    # no ignore_eos, which the model has no need of: with it the engine keeps room for whole
    # answers and never has to retract a request
    sampling = {"temperature": 0, "max_new_tokens": length}
    body = {"input_ids": prompt, "sampling_params": sampling, **fields}
    result: dict[str, Any] = server.post("/generate", body, timeout_s)
    return result


def _conversation(server: Server, traffic: Traffic, number: int) -> Iterator[Request]:
    """The rounds of one conversation, answered by ``server``, without ambiguous ones."""
    rng = random.Random(f"{traffic.seed}/{number}")

    def tokens(span: tuple[int, int]) -> list[int]:
        return [rng.randrange(2, traffic.vocabulary) for _ in range(rng.randint(*span))]

    # every third conversation starts with the same system prompt
    system = random.Random(traffic.seed)
    history = [
        system.randrange(2, traffic.vocabulary) for _ in range(traffic.shared * (number % 3 == 0))
    ]
    history += tokens(traffic.first)
    for turn in range(traffic.rounds):
        if turn and rng.random() < traffic.fork:
            history = history[: rng.randint(len(history) // 2, len(history))]
        history += tokens(traffic.question)
        result = generate(
            server, history, rng.randint(*traffic.answer), return_logprob=True, top_logprobs_num=2
        )
        best_two = result["meta_info"]["output_top_logprobs"]
        answer = result["output_ids"]
        if min(first[0] - second[0] for first, second in best_two) > traffic.tie:
            yield Request(f"conversation {number} round {turn}", list(history), answer)
        history += answer


def ask(server: Server, traffic: Traffic, parallel: int = 16) -> Pool:
    """Hold every conversation once; the server's answers become the expected ones."""
    with ThreadPoolExecutor(parallel) as threads:
        pool = threads.map(
            lambda number: list(_conversation(server, traffic, number)),
            range(traffic.conversations),
        )
        return [rounds for rounds in pool if rounds]


def pool_path(folder: Path, window: int, traffic: Traffic, model: Path) -> Path:
    """Where the pool is kept; the name changes with the traffic and with the weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(traffic)).encode())
    digest.update((model / "model.safetensors").read_bytes())
    return folder / f"reference-{window}-{digest.hexdigest()[:12]}.json"


def save(pool: Pool, path: Path) -> None:
    """Write a pool; another soak never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([[dataclasses.asdict(r) for r in rounds] for rounds in pool]))
    partial.replace(path)


def load(path: Path) -> Pool:
    """Read a pool."""
    return [[Request(**fields) for fields in rounds] for rounds in json.loads(path.read_text())]


@dataclasses.dataclass(frozen=True)
class Job:
    """A request to send. ``abort_at`` is when its client gives up, in latencies of the
    client's last request; None if it waits for the answer."""

    rid: str
    request: Request
    abort_at: float | None


class Picker:
    """Decides what is sent next: the same sequence for the same seed, for all clients together.

    Conversations used lately are preferred, so that there is something to reuse, and all
    others come back now and then, so that there is something to evict.
    """

    ABORT = 0.15
    RECENT = 0.6
    RESEND = 0.2

    def __init__(self, pool: Pool, seed: int) -> None:
        self._pool = pool
        self._rng = random.Random(seed)
        self._recent: deque[int] = deque(maxlen=max(1, len(pool) // 6))
        self._next = [0] * len(pool)
        self._sent = 0
        self._lock = threading.Lock()

    def pick(self) -> Job:
        """The next request; from any thread."""
        with self._lock:
            rng = self._rng
            if self._recent and rng.random() < self.RECENT:
                number = rng.choice(self._recent)
            else:
                number = rng.randrange(len(self._pool))
            self._recent.append(number)
            rounds, turn = self._pool[number], self._next[number]
            if turn and rng.random() < self.RESEND:
                turn = rng.randrange(turn)
            else:
                self._next[number] = (turn + 1) % len(rounds)
            abort_at = rng.uniform(0.0, 1.2) if rng.random() < self.ABORT else None
            self._sent += 1
            # of one length: the engine aborts every request whose rid starts with the given one
            return Job(f"soak-{self._sent:09d}", rounds[turn], abort_at)
