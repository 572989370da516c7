"""Requests at the edges of pages, of the engine's features and of both, on all three tiers: token
ids and log-probabilities are those of a server without a cache."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch import traffic
from launch.models.adapter import make_adapter
from launch.models.text import ready_made_text
from launch.server import OURS, Server
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.test_storage import flush, stored_in

# a tier with every page, and every tier with a page (the rest of the product: --all-kits); a server
# with a storage has the other tiers too
CELLS = [
    pytest.param("device", 1, marks=pytest.mark.full),
    pytest.param("host", 16, marks=pytest.mark.full),
    ("storage", 64),
]
MORE = [(tier, page) for tier in ("device", "host", "storage") for page in (1, 16, 64)]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "size": {"type": "integer"},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def tokens(seed: int, length: int) -> list[int]:
    """Token ids of whole words."""
    return traffic.tokens(seed, length, range(2000, 30_000))


def request(prompt: list[int], length: int, **fields: Any) -> dict[str, Any]:
    """The body of a greedy request."""
    sampling = {"temperature": 0, "max_new_tokens": length, **fields.pop("sampling", {})}
    return {"input_ids": prompt, "sampling_params": sampling, **fields}


def lengths(page: int) -> list[dict[str, Any]]:
    """Prompts around a page and behind a window, answers of no token, of one and of a page."""
    around = sorted({1, max(1, page - 1), page, page + 1, 3 * page - 1, 256, 256 + page})
    answers = [(n, new) for n in around for new in (0, 1)] + [(page, page + 1), (256, page + 1)]
    return [request(tokens(n, n), new, return_logprob=True) for n, new in answers]


def features(page: int) -> list[dict[str, Any]]:
    """Everything that ends, cuts or scores an answer otherwise."""
    long = 300 + page // 2
    scored = {"return_logprob": True, "top_logprobs_num": 2}
    return [
        *(
            request(tokens(1, long), 5, logprob_start_len=start, **scored)
            for start in (-1, 0, page // 2 + 1, 256 + page // 2 + 1, long - 1)
        ),
        request(tokens(2, long), 9, sampling={"n": 3}),
        request(tokens(3, long), 40, sampling={"regex": "[a-z]{3,9} [0-9]{2,5}"}, **scored),
        request(tokens(3, long), 60, sampling={"json_schema": json.dumps(SCHEMA)}, **scored),
        *(
            request(tokens(4, long), 20, lora_path=adapter, return_logprob=True)
            for adapter in ("one", None, "two")
        ),
        # twelve at once are more than may run
        *(request(tokens(50 + n, 150), 24, priority=n * 7 % 12 * 10) for n in range(12)),
    ]


@dataclasses.dataclass(frozen=True)
class Told:
    """What a server said."""

    ids: tuple[int, ...]
    text: str
    finish: str
    scores: tuple[float, ...]
    cached: int
    retractions: int


def told(answer: dict[str, Any]) -> Told:
    """The part of one answer that a cache must not change, and what came from the cache."""
    meta = answer["meta_info"]
    # an answer of no token has a score if another request in its batch has an answer
    parts = ("input", "output") if answer["output_ids"] else ("input",)
    scores = [score for part in parts for score in meta.get(f"{part}_token_logprobs", ())]
    for part in parts:
        scores += [score for top in meta.get(f"{part}_top_logprobs", ()) for score in top or ()]
    return Told(
        tuple(answer["output_ids"]),
        answer["text"],
        json.dumps(meta["finish_reason"]),
        # the first token of a prompt has none
        tuple(score[0] for score in scores if score[0] is not None),
        meta["cached_tokens"],
        meta.get("num_retractions", 0),
    )


def ask(server: Server, bodies: list[dict[str, Any]], parallel: int) -> list[Told]:
    """All answers, those of one request with ``n`` one after another."""

    def post(body: dict[str, Any]) -> list[Told]:
        answer = server.post("/generate", body)
        return [told(one) for one in (answer if isinstance(answer, list) else [answer])]

    with ThreadPoolExecutor(parallel) as pool:
        return [one for answers in pool.map(post, bodies) for one in answers]


def stop_inside_a_page(server: Server, page: int) -> list[dict[str, Any]]:
    """A stop string that an answer without a cache has in the middle of a page, and the next turn.

    Args:
        server: without a cache.
    """
    prompt = tokens(9, 256)
    whole = server.post("/generate", request(prompt, page + 8))
    words = [
        server.post("/generate", request(prompt, n))["text"] for n in (page // 2, page // 2 + 2)
    ]
    stop = {"stop": words[1][len(words[0]) :], "no_stop_trim": True}
    assert stop["stop"]
    ended = server.post("/generate", request(prompt, page + 8, sampling=stop))
    assert len(ended["output_ids"]) < len(whole["output_ids"])
    follows = [*prompt, *ended["output_ids"], *tokens(10, 20)]
    return [request(prompt, page + 8, sampling=stop), request(follows, 9, return_logprob=True)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of every server here."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = [
        f"{name}={make_adapter(ready_made_text(), folder / name, seed)}"
        for seed, name in enumerate(("one", "two"))
    ]
    return [
        *("--model-path", str(ready_made_text()), "--enable-lora", "--lora-paths", *paths),
        *("--max-lora-rank", "4", "--lora-backend", "torch_native", "--max-loras-per-batch", "3"),
        *("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "5"),
        *("--lora-drain-wait-threshold", "1"),
    ]


Asked = tuple[list[dict[str, Any]], list[Told]]


@pytest.fixture(scope="module")
def expected(serve, adapters: list[str]) -> Iterator[Callable[[int], Asked]]:  # noqa: ANN001
    """(requests, answers) of a server without a cache, by page size."""
    known: dict[int, Asked] = {}
    with serve(128, *adapters, "--disable-radix-cache", tokens=16384) as server:

        def of(page: int) -> Asked:
            if page not in known:
                bodies = [*lengths(page), *features(page), *stop_inside_a_page(server, page)]
                known[page] = bodies, ask(server, bodies, 12)
            return known[page]

        yield of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Three servers, or all nine."""
    cells = MORE if metafunc.config.getoption("--all-kits") else CELLS
    metafunc.parametrize(("tier", "page"), cells)


def test_edges(serve, adapters, expected, tier: str, page: int, tmp_path: Path) -> None:  # noqa: ANN001
    bodies, right = expected(page)
    options = {
        "device": list(OURS),
        "host": [*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4"],
        "storage": stored_in(tmp_path),
    }[tier]
    with serve(128, *adapters, *options, "--page-size", str(page), tokens=4096) as server:
        cold = ask(server, bodies, 12)
        again = ask(server, bodies, 3)
        if tier == "storage":
            flush(server)
        else:
            ask(server, [request(tokens(100 + n, 500), 1) for n in range(12)], 4)
        later = ask(server, bodies, 3)
        assert_idle_and_alive(server)
    for answers in (cold, again, later):
        assert_same(bodies, answers, right)
    assert any(one.retractions for one in cold), "no request was preempted"
    assert sum(one.cached for one in again) > 0
    if tier != "device":
        assert sum(one.cached for one in later) > 0


def assert_same(bodies: list[dict[str, Any]], answers: list[Told], right: list[Told]) -> None:
    """Ids, texts and ends are the same, log-probabilities within what float32 rounds."""
    asked = [body for body in bodies for _ in range(body["sampling_params"].get("n", 1))]
    assert len(asked) == len(answers) == len(right)
    for body, one, other in zip(asked, answers, right, strict=True):
        assert (one.ids, one.text, one.finish) == (other.ids, other.text, other.finish), body
        assert one.scores == pytest.approx(other.scores, abs=1e-4), body
