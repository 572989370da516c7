"""Traces on which one rule of eviction is known to be right, and variations of real ones."""

from collections.abc import Callable, Iterator

import numpy as np

from launch.bench.page_paths import Trace

Requests = Iterator[tuple[list[int], int]]
_PAGE = 64
_SPAN = (4, 16)
"""Pages of a prompt."""


def _prompt(number: int, generator: np.random.Generator, sizes: dict[int, int]) -> list[int]:
    if number not in sizes:
        sizes[number] = int(generator.integers(*_SPAN))
    return [number * _SPAN[1] + page for page in range(sizes[number])]


def _trace(numbers: Iterator[int], seed: int) -> Trace:
    generator, sizes = np.random.default_rng(seed), {}
    prompts = (_prompt(number, generator, sizes) for number in numbers)
    return Trace.of(((prompt, len(prompt) * _PAGE + 1) for prompt in prompts), _PAGE)


def recency(requests: int = 8000, seed: int = 1, mean: float = 60.0, new: float = 0.2) -> Trace:
    """What was used last is used next: nothing finds more than least recently used does."""

    def numbers() -> Iterator[int]:
        generator = np.random.default_rng((seed, 1))
        stack: list[int] = []
        for number in range(requests):
            distance = int(generator.exponential(mean))
            if generator.random() < new or distance >= len(stack):
                stack.append(number)
            else:
                stack.append(stack.pop(-1 - distance))
            yield stack[-1]

    return _trace(numbers(), seed)


def cycle(requests: int = 8000, seed: int = 1, prompts: int = 150) -> Trace:
    """The same prompts round and round: what was used last is used last."""
    return _trace((number % prompts for number in range(requests)), seed)


def popular(requests: int = 8000, seed: int = 1, prompts: int = 1000) -> Trace:
    """Each prompt with a chance of its own, whatever came before."""
    generator = np.random.default_rng((seed, 2))
    weights = np.arange(1, prompts + 1) ** -0.9
    drawn = generator.choice(prompts, size=requests, p=weights / weights.sum())
    return _trace(iter(drawn.tolist()), seed)


def once(requests: int = 8000, seed: int = 1, prompts: int = 60) -> Trace:
    """Some prompts come again and again, among others that come once."""
    generator = np.random.default_rng((seed, 3))
    again = generator.random(requests) < 0.5
    drawn = generator.integers(prompts, size=requests)
    numbers = np.where(again, drawn, prompts + np.arange(requests))
    return _trace(iter(numbers.tolist()), seed)


STRESS: dict[str, Callable[[], Trace]] = {
    "recency": recency,
    "cycle": cycle,
    "popular": popular,
    "once": once,
}


def first_half(trace: Trace) -> Trace:
    """Requests of the first half."""
    return trace.part(range(len(trace.paths) // 2))


def second_half(trace: Trace) -> Trace:
    """Requests of the second half."""
    return trace.part(range(len(trace.paths) // 2, len(trace.paths)))


def thinned(trace: Trace) -> Trace:
    """Half of the conversations, each whole: by the second page, as all may share the first."""
    return trace.part(
        i
        for i, path in enumerate(trace.paths)
        if len(path) and (int(path[min(1, len(path) - 1)]) * 2654435761 >> 16) & 1
    )


def doubled(trace: Trace) -> Trace:
    """Both halves at the same time: twice as many requests between two turns."""
    half = len(trace.paths) // 2
    return trace.part(
        i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair
    )


def reversed_halves(trace: Trace) -> Trace:
    """The second half, then the first."""
    half = len(trace.paths) // 2
    return trace.part([*range(half, len(trace.paths)), *range(half)])


VARIATIONS: dict[str, Callable[[Trace], Trace]] = {
    "first half": first_half,
    "second half": second_half,
    "thinned": thinned,
    "doubled": doubled,
    "halves swapped": reversed_halves,
}
