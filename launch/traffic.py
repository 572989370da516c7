"""Seeded traffic (see ``sglang_ext.sizing.traffic``) with a server: what benchmarks, soak and
end-to-end tests send.

The next prompt contains the last answer, so one wrong token changes everything that
follows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from launch.server import Server
from sglang_ext.sizing.traffic import Chat, Session, Span


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Conversations of tests. Lengths in tokens.

    Attributes:
        shared: system prompt with which every third conversation starts.
        fork: see ``Chat``.
        parallel: conversations held at the same time.
    """

    conversations: int = 12
    rounds: int = 6
    shared: int = 100
    first: Span = (140, 450)
    question: Span = (20, 90)
    answer: Span = (8, 40)
    fork: float = 0.15
    parallel: int = 4
    vocabulary: int = 512
    seed: int = 1

    def session(self, number: int) -> Session:
        """The conversation of that number."""
        chat = Chat(
            self.conversations,
            self.rounds,
            system=self.shared,
            first=self.first,
            question=self.question,
            answer=self.answer,
            sharing=3,
            fork=self.fork,
        )
        return chat.session(number, self.vocabulary, self.seed)


def tokens(seed: int | Sequence[int] | None, length: int, ids: range = range(2, 512)) -> list[int]:
    """A prompt of random token ids; another one each time without a seed."""
    rng = np.random.default_rng(seed)
    found: list[int] = rng.integers(ids.start, ids.stop, length).tolist()
    return found


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
    session = traffic.session(number)
    turn = next(session)
    for count in range(traffic.rounds):
        prompt = turn.prompt.tolist()
        result = generate(server, prompt, turn.answer, **fields)
        yield count, prompt, result
        if count + 1 < traffic.rounds:
            turn = session.send(np.array(result["output_ids"], dtype=np.int64))
