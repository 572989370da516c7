"""Seeded multi-turn traffic whose answers are the oracle.

The next prompt contains the last answer, so one wrong token changes everything
that follows: two servers agree only if every token of every round is the same.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.server import Server


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Shape of the traffic. Lengths in tokens; ``fork`` is the chance that a round
    restarts from a random point of the history instead of its end."""

    conversations: int = 12
    rounds: int = 6
    first: tuple[int, int] = (120, 360)
    question: tuple[int, int] = (20, 90)
    answer: tuple[int, int] = (8, 40)
    fork: float = 0.15
    parallel: int = 4
    vocabulary: int = 512
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request returned."""

    conversation: int
    round: int
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    output: tuple[int, ...]


def generate(server: Server, prompt: Sequence[int], length: int) -> dict[str, Any]:
    """One greedy request of exactly ``length`` tokens."""
    # the model has no end token; with ignore_eos the engine would keep room for whole answers
    # and never have to retract a request
    sampling = {"temperature": 0, "max_new_tokens": length}
    return server.post("/generate", {"input_ids": list(prompt), "sampling_params": sampling})


def _rounds(server: Server, traffic: Traffic, number: int) -> Iterator[Answer]:
    """One conversation, a round at a time."""
    rng = random.Random(f"{traffic.seed}/{number}")

    def tokens(span: tuple[int, int]) -> list[int]:
        return [rng.randrange(2, traffic.vocabulary) for _ in range(rng.randint(*span))]

    # every third conversation starts with the same system prompt
    shared = random.Random(traffic.seed)
    history = [shared.randrange(2, traffic.vocabulary) for _ in range(100 * (number % 3 == 0))]
    history += tokens(traffic.first)
    for turn in range(traffic.rounds):
        if turn and rng.random() < traffic.fork:
            history = history[: rng.randint(len(history) // 2, len(history))]
        history += tokens(traffic.question)
        result = generate(server, history, rng.randint(*traffic.answer))
        meta = result["meta_info"]
        details = meta["cached_tokens_details"] or {"device": 0, "host": 0}
        yield Answer(
            number,
            turn,
            meta["prompt_tokens"],
            details["device"],
            details["host"],
            tuple(result["output_ids"]),
        )
        history += result["output_ids"]


def converse(server: Server, traffic: Traffic) -> list[Answer]:
    """Run all conversations round by round, in an order that the seed decides."""
    order = random.Random(traffic.seed)
    conversations = [_rounds(server, traffic, n) for n in range(traffic.conversations)]
    answers: list[Answer] = []
    with ThreadPoolExecutor(traffic.parallel) as pool:
        for _ in range(traffic.rounds):
            order.shuffle(conversations)
            answers += pool.map(next, conversations)
    return answers


def hit_rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Cached share of all prompt tokens, and the part of the cached ones from the host."""
    prompt = sum(a.prompt_tokens for a in answers)
    device = sum(a.device_tokens for a in answers)
    host = sum(a.host_tokens for a in answers)
    return {
        "hit_rate": (device + host) / prompt,
        "host_share": host / max(1, device + host),
        "prompt_tokens": prompt,
        "device_tokens": device,
        "host_tokens": host,
    }


def differences(left: Sequence[Answer], right: Sequence[Answer]) -> list[str]:
    """Requests whose tokens differ."""
    by_key = {(a.conversation, a.round): a for a in right}
    return [
        f"conversation {a.conversation} round {a.round}: {a.output} != {other.output}"
        for a in left
        if (other := by_key[a.conversation, a.round]).output != a.output
    ]
