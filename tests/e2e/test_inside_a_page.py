"""Pages of one token: what is found of each prompt, and what a router is told, beside the
engine's own cache."""

import itertools
import random
from typing import Any

import pytest

from launch.server import OURS, Server
from launch.traffic import generate
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.test_storage import flush
from tests.fixtures.kv_subscriber import KvSubscriber
from tests.fixtures.kv_view import GPU, ON_HOST

HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "6")
SALTED = (None, (7,))
"""Of the only block of the last request, which has a key and a salt."""
Answers = list[tuple[list[int], int, list[int]]]


def in_common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def by_definition(answers: Answers) -> list[int]:
    """What of each prompt is there if nothing is ever lost: all that it has in common with an
    earlier one and its answer, whose last token is not computed. One token is left to compute."""
    known: list[list[int]] = []
    found = []
    for prompt, _, answer in answers:
        found.append(max((in_common(prompt[:-1], other) for other in known), default=0))
        known.append(prompt + answer[:-1])
    return found


def ask_one_after_another(server: Server) -> Answers:
    """(prompt, tokens found, answer) of conversations that share a prompt, and of prompts that
    branch off anywhere in them or come again."""
    rng, answers = random.Random(5), []

    def words(count: int) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(count)]

    def ask(tokens: list[int], length: int) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        body = {"input_ids": tokens, "sampling_params": sampling}
        answer: Any = server.post("/generate", body, 120)
        answers.append((list(tokens), answer["meta_info"]["cached_tokens"], answer["output_ids"]))
        return list(answer["output_ids"])

    shared = words(149)
    histories = [shared + words(rng.randint(5, 120)) for _ in range(4)]
    for _ in range(3):
        for history in histories:
            history += ask(history, rng.choice([1, 7, 16, 21]))
            history += words(rng.randint(1, 60))
    for history in histories:
        cut = rng.randint(1, len(history))
        ask(history[:cut] + words(rng.randint(1, 40)), 4)
        ask(history[:cut], 4)
    ask(shared[:5] + words(3), 3)
    ask(shared[:1] + words(30), 3)
    return answers


def check_what_is_told(server: Server, router: KvSubscriber, answers: Answers) -> None:
    """A prompt finds as much as its router expects, until a flush."""
    for prompt, *_ in answers[:3] + answers[-4:]:
        expected = router.catch_up(0.2).beginning(prompt[:-1], GPU, ON_HOST)
        found = generate(server, prompt, 1)["meta_info"]["cached_tokens"]
        # of what was evicted from the device a window may be gone
        assert found == expected or (router.view.at(ON_HOST) and found < expected)
    assert router.catch_up().at(GPU)
    before = router.view.cleared
    flush(server)
    assert not any(router.wait_for(lambda view: view.cleared > before).blocks.values())
    assert router.view.cleared == before + 1


@pytest.mark.parametrize(
    ("tokens", "tier", "form"),
    [pytest.param(12_000, (), "default", marks=pytest.mark.full), (1_200, HOST, "dynamo")],
)
def test_each_request_finds_what_the_engines_own_cache_finds(
    serve,  # noqa: ANN001
    tokens: int,
    tier: tuple[str, ...],
    form: str,
) -> None:
    both, told = [], []
    for selection in (OURS, ()):
        router = KvSubscriber(strict=bool(selection), format=form)
        options = (*selection, *tier, *router.options, "--page-size", "1")
        with router, serve(128, *options, tokens=tokens) as server:
            both.append(ask_one_after_another(server))
            generate(server, [7, 8, 9], 1, extra_key="tenant", cache_salt="pepper")
            told.append(dict(router.wait_for(lambda view: SALTED in view.known.values()).known))
            if selection:
                check_what_is_told(server, router, both[0])
            assert_idle_and_alive(server)
    ours, stock = both
    assert [answer for *_, answer in ours] == [answer for *_, answer in stock]
    found = [(here, there) for (_, here, _), (_, there, _) in zip(ours, stock, strict=True)]
    assert not [request for request in found if request[0] < request[1]]
    salted = [[block for block, said in known.items() if said == SALTED] for known in told]
    assert salted[0] == salted[1]
    assert len(salted[0]) == 1
    if not tier:  # nothing was evicted
        assert [here for here, _ in found] == by_definition(ours)
        assert told[0] == told[1]
