"""The time between tokens of requests that decode, while copies are made for others."""

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from launch.bench.multiturn import distribution
from launch.server import ONE_EACH, Server
from launch.traffic import generate, tokens


@dataclasses.dataclass(frozen=True)
class Load:
    """Numbers of requests, and lengths in tokens.

    Attributes:
        answer: of what decodes alone.
        longest: of what decodes beside others, and is ended when they have come.
    """

    decoding: int
    answer: int
    longest: int
    prefix: int
    prefixes: int
    asks: int


LARGE = Load(decoding=8, answer=400, longest=4000, prefix=8192, prefixes=16, asks=16)
SMALL = Load(decoding=1, answer=6, longest=40, prefix=128, prefixes=6, asks=3)


class Decoding:
    """A request that decodes until it has its answer or is told to end.

    Args:
        number: of the request; others have other prompts.
    """

    def __init__(self, server: Server, number: int, length: int) -> None:
        self._server, self._prompt, self._length = server, tokens([9, number], 64), length
        self._ended = threading.Event()
        self._begun = threading.Event()
        self._arrived: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_for_first(self) -> None:
        """Until it decodes."""
        self._begun.wait()

    def end(self) -> None:
        """Hang up; the engine aborts it."""
        self._ended.set()

    def arrived(self) -> list[float]:
        """When each token came, by the clock of ``time.perf_counter``; waits for the end."""
        self._thread.join()
        return self._arrived

    def _run(self) -> None:
        body = {
            "input_ids": self._prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self._length,
                "ignore_eos": True,
            },
            "stream": True,
        }
        url = self._server.url
        try:
            with (
                httpx.Client(base_url=url, limits=ONE_EACH, trust_env=False, timeout=None) as http,
                http.stream("POST", "/generate", json=body) as response,
            ):
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data:") and not line.endswith("[DONE]"):
                        self._arrived.append(time.perf_counter())
                        self._begun.set()
                    if self._ended.is_set():
                        return
        finally:
            self._begun.set()


def _phase(server: Server, load: Load, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Requests decode while the prompts come one after the other; alone, if there are none."""
    length = load.longest if prompts else load.answer
    streams = [Decoding(server, number, length) for number in range(load.decoding)]
    for stream in streams:
        stream.wait_for_first()
    found = {"device": 0, "host": 0}
    begin = time.perf_counter()
    for prompt in prompts:
        tiers = generate(server, prompt, 1)["meta_info"].get("cached_tokens_details") or {}
        for tier in found:
            found[tier] += tiers.get(tier, 0)
    end = time.perf_counter() if prompts else math.inf
    if prompts:
        for stream in streams:
            stream.end()
    gaps = []
    for stream in streams:
        times = [moment for moment in stream.arrived() if begin <= moment <= end]
        gaps += [after - before for before, after in itertools.pairwise(times)]
    return {"itl_s": distribution(gaps), "tokens": len(gaps), **found}


def measure(server: Server, load: Load) -> dict[str, Any]:
    """All phases of one server.

    ``device``: the same prefix again and again. ``host``: prefixes in turn that the device has no
    room for, so each comes back from the host, if there is one. ``new``: prefixes that nobody
    has asked for, which are computed, and backed up.
    """
    prefixes = [tokens([1, number], load.prefix) for number in range(load.prefixes)]
    for prefix in prefixes:
        generate(server, prefix, 1)
    ends = [tokens([2, number], 16) for number in range(load.asks)]
    new = [tokens([3, number], load.prefix) for number in range(max(1, load.asks // 4))]
    asked = [[*prefixes[n % load.prefixes], *end] for n, end in enumerate(ends)]
    return {
        "alone": _phase(server, load, []),
        "host": _phase(server, load, asked),
        "device": _phase(server, load, [[*prefixes[load.asks - 1], *end] for end in ends]),
        "new": _phase(server, load, new),
    }
