"""A finite pool of multi-turn requests with known answers, and who sends which one next."""

import dataclasses
import hashlib
import json
import os
import random
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.server import Server
from launch.traffic import Traffic, hold_conversation

SOAK = Traffic(conversations=48, rounds=5, shared=150, parallel=16)
"""Enough conversations for eviction, few enough to be answered once by a server alone."""
TIE = 1e-4
"""Tokens whose log-probabilities are closer may swap with the order of the additions,
which depends on how prompts were cut and batched. A cache is not to blame for that, so
rounds with such an answer are not part of the pool."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One round of a conversation: what is sent and what must come back."""

    name: str
    prompt: list[int]
    answer: list[int]


Pool = list[list[Request]]
"""Requests by conversation and round."""


def _requests(server: Server, traffic: Traffic, number: int) -> Iterator[Request]:
    """The rounds of one conversation, answered by ``server``, without ambiguous ones."""
    logprobs = {"return_logprob": True, "top_logprobs_num": 2}
    for turn, prompt, result in hold_conversation(server, traffic, number, **logprobs):
        best_two = result["meta_info"]["output_top_logprobs"]
        if min(first[0] - second[0] for first, second in best_two) > TIE:
            yield Request(f"conversation {number} round {turn}", prompt, result["output_ids"])


def ask(server: Server, traffic: Traffic) -> Pool:
    """Hold every conversation once; the server's answers become the expected ones."""
    with ThreadPoolExecutor(traffic.parallel) as threads:
        pool = threads.map(
            lambda number: list(_requests(server, traffic, number)),
            range(traffic.conversations),
        )
        return [rounds for rounds in pool if rounds]


def pool_path(folder: Path, traffic: Traffic, model: Path) -> Path:
    """Where the pool is kept; the name changes with the traffic and with the weights."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(traffic), TIE]).encode())
    digest.update((model / "model.safetensors").read_bytes())
    return folder / f"reference-{model.name}-{digest.hexdigest()[:12]}.json"


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
