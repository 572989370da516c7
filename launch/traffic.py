"""Seeded multi-turn conversations with a server: what soak and end-to-end tests send.

The next prompt contains the last answer, so one wrong token changes everything that
follows.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

from launch.server import Server


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Shape of the conversations. Lengths in tokens.

    Attributes:
        shared: system prompt with which every third conversation starts.
        fork: chance that a round restarts from a random point of the history instead
            of its end.
        parallel: conversations held at the same time.
    """

    conversations: int = 12
    rounds: int = 6
    shared: int = 100
    first: tuple[int, int] = (120, 360)
    question: tuple[int, int] = (20, 90)
    answer: tuple[int, int] = (8, 40)
    fork: float = 0.15
    parallel: int = 4
    vocabulary: int = 512
    seed: int = 1


def generate(
    server: Server, prompt: Sequence[int], length: int, timeout_s: float = 600.0, **fields: Any
) -> dict[str, Any]:
    """One greedy request of exactly ``length`` tokens; ``fields`` go into it as they are."""
    # the model has no end token, and with ignore_eos the engine would keep room for whole
    # answers and never have to retract a request
    sampling = {"temperature": 0, "max_new_tokens": length}
    body = {"input_ids": list(prompt), "sampling_params": sampling, **fields}
    result: dict[str, Any] = server.post("/generate", body, timeout_s)
    return result


def hold_conversation(
    server: Server, traffic: Traffic, number: int, **fields: Any
) -> Iterator[tuple[int, list[int], dict[str, Any]]]:
    """One conversation, a round at a time: (round, prompt, what the server returned)."""
    rng = random.Random(f"{traffic.seed}/{number}")

    def tokens(span: tuple[int, int]) -> list[int]:
        return [rng.randrange(2, traffic.vocabulary) for _ in range(rng.randint(*span))]

    system = random.Random(traffic.seed)
    shared = traffic.shared if number % 3 == 0 else 0
    history = [system.randrange(2, traffic.vocabulary) for _ in range(shared)]
    history += tokens(traffic.first)
    for turn in range(traffic.rounds):
        if turn and rng.random() < traffic.fork:
            history = history[: rng.randint(len(history) // 2, len(history))]
        history += tokens(traffic.question)
        result = generate(server, history, rng.randint(*traffic.answer), **fields)
        yield turn, list(history), result
        history += result["output_ids"]
