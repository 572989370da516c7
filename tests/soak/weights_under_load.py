"""Weights that change under load, with a storage that keeps pages of all of them.

Clients send prompts with long shared beginnings while the server's weights go back and forth
between two models. Every answer must be that of the weights that were there when it was
computed, as a server without any cache gives it; and so must those of a server that is started
with the first weights on the same directory afterwards.

    python -m tests.soak.weights_under_load --tp 2 --updates 50 --seconds-between 5
"""

import argparse
import contextlib
import dataclasses
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from launch.models import tiny
from launch.server import CPU, OURS, STRICT_CHECKS, Server, running
from launch.traffic import generate
from sglang_ext.arguments import Parser, number, whole
from sglang_ext.sizing.traffic import SharedPrefix

OPTIONS = (
    *("--dtype", "float32", "--mem-fraction-static", "0.5", "--max-running-requests", "8"),
    *("--skip-server-warmup", "--hicache-io-backend", "direct", "--page-size", "16"),
)
ANSWER = 8
NOT_FLUSHED = "the cache was not flushed because"
"""What the engine says if anything runs; right behind an answer its batch is the last one for a
moment."""
Prompt = list[int]
Answers = list[list[int]]
Start = Callable[..., contextlib.AbstractContextManager[Server]]
"""Starts a server of the first model: ``with start(*options) as server``."""


def second_model(directory: Path) -> Path:
    """The tiny model with other weights."""
    return tiny.make_model(tiny.parse_args(["--out", str(directory), "--seed", "1"]))


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of 500 to 900 tokens; most of them share a beginning with others."""
    shape = SharedPrefix(count, prompts=count, system=(400, 400), question=(100, 500))
    return [next(shape.session(n, 512, seed)).prompt.tolist() for n in range(count)]


def update(server: Server, model: Path, **fields: Any) -> None:
    """Load other weights.

    Raises:
        httpx.HTTPStatusError: the server did not.
    """
    server.post("/update_weights_from_disk", {"model_path": str(model), **fields})


def update_under_load(server: Server, model: Path) -> bool:
    """Load other weights; False: what the old ones have computed was there for a while beside the
    new ones, and requests may have got some of both.

    Raises:
        httpx.HTTPStatusError: the server did not.
    """
    try:
        update(server, model)
    except httpx.HTTPStatusError as error:
        if NOT_FLUSHED not in error.response.text:
            raise
    else:
        return True
    # as the engine says
    server.post("/pause_generation", {"mode": "retract"})
    update(server, model)
    server.post("/continue_generation", {})
    return False


def answer_all(server: Server, asked: Sequence[Prompt], clients: int = 4) -> Answers:
    """Answers to all prompts."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda p: generate(server, p, ANSWER)["output_ids"], asked))


def without_cache(start: Start, models: Sequence[Path], asked: Sequence[Prompt]) -> list[Answers]:
    """What each model answers, by a server without any cache."""
    with start("--disable-radix-cache", "--max-total-tokens", "16384") as server:
        answers = [answer_all(server, asked)]
        for model in models[1:]:
            update(server, model)
            answers.append(answer_all(server, asked))
    return answers


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer under load, and when it was asked for and given."""

    prompt: int
    began: float
    ended: float
    tokens: list[int]
    from_storage: int


@dataclasses.dataclass(frozen=True)
class Span:
    """A model that may have been served from when it was asked for until the next one was
    there."""

    model: int
    since: float
    until: float


class Clients:
    """Threads that send prompts until they are stopped."""

    def __init__(self, server: Server, asked: Sequence[Prompt], count: int, seed: int) -> None:
        self.replies: list[Reply] = []
        self.errors: list[BaseException] = []
        self._server = server
        self._asked = asked
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed}/{n}"),))
            for n in range(count)
        ]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                number = rng.randrange(len(self._asked))
                began = time.monotonic()
                result = generate(self._server, self._asked[number], ANSWER)
                details = result["meta_info"]["cached_tokens_details"] or {}
                stored = details.get("storage", 0)
                ended = time.monotonic()
                self.replies.append(Reply(number, began, ended, result["output_ids"], stored))
        except (httpx.HTTPError, KeyError) as error:
            self.errors.append(error)

    def wait_for(self, more: int, timeout_s: float = 600.0) -> None:
        """Wait for so many replies more.

        Raises:
            RuntimeError: they did not come, or a client has failed.
        """
        goal, deadline = len(self.replies) + more, time.monotonic() + timeout_s
        while len(self.replies) < goal:
            if self.errors or time.monotonic() > deadline:
                raise RuntimeError(f"clients got no further: {self.errors}\n{self._server.tail()}")
            time.sleep(0.01)


def wrong(
    replies: Sequence[Reply], spans: Sequence[Span], expected: Sequence[Answers]
) -> list[str]:
    """Replies that no model gave that was there between question and answer."""
    found = []
    for reply in replies:
        there = [s.model for s in spans if s.since <= reply.ended and reply.began <= s.until]
        if all(reply.tokens != expected[model][reply.prompt] for model in there):
            gave = [
                n for n, answers in enumerate(expected) if reply.tokens == answers[reply.prompt]
            ]
            found.append(
                f"prompt {reply.prompt}: weights of {there}, answer of {gave or 'none'}, "
                f"{reply.from_storage} tokens from storage"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        replies: answers under load, each of one kind of weights; spans: which ones were there when.
        afterwards: answers of a server of the first weights, and its tokens from storage.
    """

    replies: list[Reply]
    spans: list[Span]
    afterwards: Answers
    afterwards_from_storage: int


def go_back_and_forth(
    start: Start,
    models: Sequence[Path],
    asked: Sequence[Prompt],
    *,
    clients: int = 8,
    updates: int = 3,
    replies_between: int = 24,
    seconds_between: float = 0.0,
) -> Outcome:
    """Change the weights under load, then start anew with the first ones."""
    with start() as server, Clients(server, asked, clients, seed=0) as load:
        times, mixed = [(0, 0.0, 0.0)], list[tuple[float, float]]()
        load.wait_for(replies_between)
        for number in range(1, updates + 1):
            model = number % len(models)
            wanted = time.monotonic()
            alone = update_under_load(server, models[model])
            times.append((model, wanted, time.monotonic()))
            mixed += [] if alone else [times[-1][1:]]
            load.wait_for(replies_between)
            time.sleep(seconds_between)
    replies = [
        reply
        for reply in load.replies
        if not any(since <= reply.ended and reply.began <= until for since, until in mixed)
    ]
    ends = [there for _, _, there in times[1:]] + [float("inf")]
    spans = [Span(m, wanted, end) for (m, wanted, _), end in zip(times, ends, strict=True)]
    if load.errors:
        raise RuntimeError(f"clients failed: {load.errors}")
    with start() as server:
        results = [generate(server, prompt, ANSWER) for prompt in asked]
        details = [r["meta_info"]["cached_tokens_details"] or {} for r in results]
        afterwards = [r["output_ids"] for r in results]
    stored = sum(d.get("storage", 0) for d in details)
    return Outcome(replies, spans, afterwards, stored)


def storage(directory: Path) -> list[str]:
    """Options of a server with pages in a directory."""
    extra = {"file_storage_path": str(directory), "prefetch_threshold": 16}
    return [
        *(*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "2"),
        *("--hicache-storage-backend", "file"),
        *("--hicache-storage-prefetch-policy", "wait_complete"),
        *("--hicache-storage-backend-extra-config", json.dumps(extra)),
    ]


@contextlib.contextmanager
def _server(first: Path, log: Path, *options: str) -> Iterator[Server]:
    everything = ["--model-path", str(first), *OPTIONS, *options]
    ranks = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if "--tp" in options else {}
    with running(everything, log, {**CPU, **STRICT_CHECKS, **ranks}) as server:
        yield server


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1)
    parser.add_argument("--clients", type=whole(1), default=8)
    parser.add_argument("--updates", type=whole(1), default=20)
    parser.add_argument("--seconds-between", type=number(0), default=2.0)
    parser.add_argument("--prompts", type=whole(1), default=40)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if a token was wrong."""
    args = parse_args(argv)
    asked = prompts(args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = [tiny.ready_made(128), second_model(root / "second")]
        expected = without_cache(
            lambda *options: _server(models[0], root / "reference.log", *options), models, asked
        )
        options = [*storage(root / "pages"), "--max-total-tokens", "8192"]
        if args.tp > 1:
            options += ["--tp", str(args.tp)]
        outcome = go_back_and_forth(
            lambda *_: _server(models[0], root / "ours.log", *options),
            models,
            asked,
            clients=args.clients,
            updates=args.updates,
            seconds_between=args.seconds_between,
        )
    faults = wrong(outcome.replies, outcome.spans, expected)
    afterwards = sum(a != b for a, b in zip(outcome.afterwards, expected[0], strict=True))
    stored = sum(reply.from_storage for reply in outcome.replies)
    print(
        f"{args.updates} updates, {len(outcome.replies)} answers, {len(faults)} wrong, {stored} "
        f"tokens from storage; afterwards {len(outcome.afterwards)} answers, {afterwards} wrong, "
        f"{outcome.afterwards_from_storage} tokens from storage"
    )
    print(*faults[:20], sep="\n")
    return int(bool(faults or afterwards))


if __name__ == "__main__":
    raise SystemExit(main())
