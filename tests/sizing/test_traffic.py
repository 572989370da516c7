"""Shapes of traffic."""

import numpy as np
import pytest

from sglang_ext.sizing.traffic import SHAPES, Agent, Chat, Shape, SharedPrefix, interleave

SMALL: list[Shape] = [
    Chat(sessions=6, rounds=4, system=20),
    Agent(sessions=6, steps=5, kinds=2, tools=40),
    SharedPrefix(sessions=24, prompts=4, system=(30, 60)),
]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: type(shape).__name__)
def test_a_seed_gives_the_same_requests_and_as_many_as_it_says(shape: Shape) -> None:
    first, second = (list(interleave(shape, 3, 1000, seed=5)) for _ in range(2))
    other = list(interleave(shape, 3, 1000, seed=6))
    assert len(first) == shape.turns
    assert all(
        np.array_equal(a, c) and np.array_equal(b, d)
        for (a, b), (c, d) in zip(first, second, strict=True)
    )
    assert any(not np.array_equal(a, c) for (a, _), (c, _) in zip(first, other, strict=True))


def test_a_turn_of_a_chat_sends_history_and_answer() -> None:
    session = Chat(rounds=3, system=10).session(0, 1000, seed=1)
    turn = next(session)
    answer = np.arange(turn.answer)
    following = session.send(answer)
    sent = np.concatenate((turn.prompt, answer))
    assert np.array_equal(following.prompt[: len(sent)], sent)
    assert len(following.prompt) > len(sent)


def test_an_edit_goes_back_behind_the_last_call() -> None:
    always = Agent(edit=1.0, tools=10).session(0, 1000, seed=1)
    turn = next(always)
    edited = always.send(np.arange(turn.answer))
    common = min(len(turn.prompt), len(edited.prompt))
    assert np.array_equal(turn.prompt[:common], edited.prompt[:common])
    assert not np.array_equal(edited.prompt[common:][: turn.answer], np.arange(turn.answer))


def test_popular_prompts_are_asked_more_often() -> None:
    shape = SharedPrefix(sessions=300, prompts=20, exponent=1.2, system=(30, 60))
    starts = [tuple(prompt[:30]) for prompt, _ in interleave(shape, 8, 1000, seed=1)]
    counts = sorted((starts.count(start) for start in set(starts)), reverse=True)
    assert counts[0] > 4 * counts[len(counts) // 2]


def test_every_shape_has_a_name() -> None:
    assert {type(shape) for shape in SMALL} == set(SHAPES.values())


def test_no_more_sessions_go_on_than_asked_for() -> None:
    """Questions of one token name their session: its number of turns tells when it ended."""
    shape = Chat(sessions=9, rounds=4, system=0, first=(1, 1), question=(1, 1), answer=(1, 1))
    going: dict[int, int] = {}
    most = 0
    for prompt, _ in interleave(shape, 3, 1 << 40, seed=1):
        session = int(prompt[0])
        going[session] = going.get(session, 0) + 1
        most = max(most, len(going))
        if going[session] == shape.rounds:
            del going[session]
    assert most == 3
