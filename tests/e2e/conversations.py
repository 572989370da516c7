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
from launch.traffic import Traffic, hold_conversation


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request returned."""

    conversation: int
    round: int
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    storage_tokens: int
    output: tuple[int, ...]
    retractions: int = 0
    request: str = ""
    """What the server calls it."""
    tops: tuple[tuple[float, float], ...] = ()
    """Log-probabilities, see the function of that name."""


def tops(meta: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    """Log-probabilities of each token of an answer and of the next likeliest; none if the request
    did not ask for two."""
    return tuple((top[0], second[0]) for top, second in meta.get("output_top_logprobs") or ())


def rounds(server: Any, traffic: Traffic, number: int, **fields: Any) -> Iterator[Answer]:
    """One conversation, a round at a time; ``fields`` go into each request as they are."""
    for turn, _, result in hold_conversation(server, traffic, number, **fields):
        meta = result["meta_info"]
        details = meta["cached_tokens_details"] or {"device": 0, "host": 0}
        yield Answer(
            number,
            turn,
            meta["prompt_tokens"],
            details["device"],
            details["host"],
            details.get("storage", 0),
            tuple(result["output_ids"]),
            meta.get("num_retractions", 0),
            meta["id"],
            tops(meta),
        )


class _Relay:
    """Hands requests to whatever server the conversations are held with now."""

    server: Server

    def post(self, path: str, body: Any, timeout_s: float) -> Any:
        return self.server.post(path, body, timeout_s)


class Conversations:
    """Conversations that can go on with another server; ``fields`` go into each request."""

    def __init__(self, traffic: Traffic, **fields: Any) -> None:
        self._relay = _Relay()
        self._parallel = traffic.parallel
        self._order = random.Random(traffic.seed)
        numbers = range(traffic.conversations)
        self._all = [rounds(self._relay, traffic, n, **fields) for n in numbers]

    def hold(self, server: Server, rounds: int) -> list[Answer]:
        """The next rounds of all of them, in an order that the seed decides."""
        self._relay.server = server
        answers: list[Answer] = []
        with ThreadPoolExecutor(self._parallel) as pool:
            for _ in range(rounds):
                self._order.shuffle(self._all)
                answers += pool.map(next, self._all)
        return answers


def converse(server: Server, traffic: Traffic, **fields: Any) -> list[Answer]:
    """Run all conversations round by round, in an order that the seed decides."""
    return Conversations(traffic, **fields).hold(server, traffic.rounds)


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
