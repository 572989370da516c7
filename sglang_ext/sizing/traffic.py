"""Seeded traffic of three shapes, as sessions that are told the answers they get.

A session is a generator: it yields a turn and is sent the answer's tokens. So the same
sessions drive a replay, which makes answers up, and a real server (see ``launch.traffic``).
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Span = tuple[int, int]
"""Smallest and largest length in tokens; uniform in between."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One request: the whole prompt, and how many tokens the answer has."""

    prompt: Tokens
    answer: int


Session = Generator[Turn, Tokens, None]


class Shape(Protocol):
    """A kind of traffic."""

    @property
    def sessions(self) -> int:
        """How many sessions there are."""
        ...

    @property
    def turns(self) -> int:
        """Requests in all."""
        ...

    def session(self, number: int, vocabulary: int, seed: int) -> Session:
        """The session of that number; the same for the same arguments and answers."""
        ...


class _Writer:
    """Random tokens and lengths of one session."""

    def __init__(self, vocabulary: int, *key: int) -> None:
        self.rng = np.random.default_rng(key)
        self._vocabulary = vocabulary

    def text(self, span: Span) -> Tokens:
        """A text of random length."""
        return self.rng.integers(2, self._vocabulary, self.length(span))

    def length(self, span: Span) -> int:
        """A random length."""
        return int(self.rng.integers(span[0], span[1] + 1))


# first part of a key: what the random numbers are for
_SESSION, _SYSTEM, _POPULARITY, _ORDER, _ANSWER = range(5)


def _system(vocabulary: int, seed: int, number: int, length: Span) -> Tokens:
    """A system prompt that many sessions share."""
    return _Writer(vocabulary, _SYSTEM, seed, number).text(length)


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """Multi-turn conversations: each turn sends the history and a new question.

    Attributes:
        system: length of the system prompt.
        sharing: it is in front of every so many-th session.
        fork: chance that a turn goes on from inside the history instead of from its end.
    """

    sessions: int = 200
    rounds: int = 8
    system: int = 200
    first: Span = (200, 2000)
    question: Span = (20, 400)
    answer: Span = (50, 600)
    sharing: int = 1
    fork: float = 0.0

    @property
    def turns(self) -> int:
        """See Shape."""
        return self.sessions * self.rounds

    def session(self, number: int, vocabulary: int, seed: int) -> Session:
        """See Shape."""
        write = _Writer(vocabulary, _SESSION, seed, number)
        shared = 0 if number % self.sharing else self.system
        system = _system(vocabulary, seed, 0, (shared, shared))
        history = np.concatenate((system, write.text(self.first)))
        for turn in range(self.rounds):
            if turn:
                if self.fork and write.rng.random() < self.fork:
                    history = history[: write.length((len(history) // 2, len(history)))]
                history = np.concatenate((history, write.text(self.question)))
            answer = yield Turn(history, write.length(self.answer))
            history = np.concatenate((history, answer))


@dataclasses.dataclass(frozen=True, slots=True)
class Agent:
    """Agents that call tools: short calls, long results, and now and then the last turn is
    edited and tried again.

    Attributes:
        tools: length of the tool descriptions, shared by all agents of a kind.
        edit: chance that a step replaces the last call and its result instead of going on.
    """

    sessions: int = 100
    steps: int = 16
    kinds: int = 4
    tools: int = 2000
    task: Span = (50, 500)
    call: Span = (20, 150)
    result: Span = (50, 1500)
    edit: float = 0.15

    @property
    def turns(self) -> int:
        """See Shape."""
        return self.sessions * self.steps

    def session(self, number: int, vocabulary: int, seed: int) -> Session:
        """See Shape."""
        write = _Writer(vocabulary, _SESSION, seed, number)
        tools = _system(vocabulary, seed, number % self.kinds, (self.tools, self.tools))
        history = np.concatenate((tools, write.text(self.task)))
        before_last = history
        for step in range(self.steps):
            if step and write.rng.random() < self.edit:
                history = np.concatenate((before_last, write.text(self.task)))
            call = yield Turn(history, write.length(self.call))
            before_last = history
            history = np.concatenate((history, call, write.text(self.result)))


@dataclasses.dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Single questions behind long system prompts whose popularity is Zipf's.

    Attributes:
        prompts: system prompts.
        exponent: the n-th most popular one is asked in proportion to n ** -exponent.
    """

    sessions: int = 2000
    prompts: int = 100
    exponent: float = 1.0
    system: Span = (1000, 6000)
    question: Span = (20, 400)
    answer: Span = (20, 300)

    @property
    def turns(self) -> int:
        """See Shape."""
        return self.sessions

    def session(self, number: int, vocabulary: int, seed: int) -> Session:
        """See Shape."""
        weights = np.arange(1, self.prompts + 1) ** -self.exponent
        draw = np.random.default_rng((_POPULARITY, seed, number))
        chosen = int(draw.choice(self.prompts, p=weights / weights.sum()))
        system = _system(vocabulary, seed, chosen, self.system)
        write = _Writer(vocabulary, _SESSION, seed, number)
        prompt = np.concatenate((system, write.text(self.question)))
        yield Turn(prompt, write.length(self.answer))


SHAPES: dict[str, type[Chat] | type[Agent] | type[SharedPrefix]] = {
    "chat": Chat,
    "agent": Agent,
    "shared-prefix": SharedPrefix,
}
"""Shapes by name."""


def interleave(
    shape: Shape,
    active: int,
    vocabulary: int,
    seed: int,
    answer: Callable[[Turn], Tokens] | None = None,
) -> Iterator[tuple[Tokens, Tokens]]:
    """Turns of all sessions in random order: (prompt, answer).

    Args:
        active: sessions going on at the same time, at most.
        answer: who answers; None makes random answers up.
    """
    order = np.random.default_rng((_ORDER, seed))
    writer = _Writer(vocabulary, _ANSWER, seed)
    waiting = iter(range(shape.sessions))
    going: list[tuple[Session, Turn]] = []
    while True:
        while len(going) < active and (number := next(waiting, None)) is not None:
            session = shape.session(number, vocabulary, seed)
            going.append((session, next(session)))
        if not going:
            return
        chosen = int(order.integers(len(going)))
        session, turn = going[chosen]
        said = answer(turn) if answer else writer.text((turn.answer, turn.answer))
        yield turn.prompt, said
        try:
            going[chosen] = session, session.send(said)
        except StopIteration:
            del going[chosen]
