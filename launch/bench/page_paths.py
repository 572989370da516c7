"""Traces as paths of pages: real ones, and generated traffic."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.bench.hits import SHAPES
from sglang_ext.sizing.traffic import interleave


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Paths of requests.

    Attributes:
        paths: (pages of a request,) int32 each, numbers of pages; equal ones have equal prefixes.
        tokens: (requests,) of the prompts.
        parent: (pages,) int32, page before, or -1.
        page: tokens.
    """

    paths: list[NDArray[np.int32]]
    tokens: NDArray[np.int64]
    parent: NDArray[np.int32]
    page: int

    @classmethod
    def of(cls, requests: Iterable[tuple[Sequence[Any], int]], page: int) -> "Trace":
        """From (what its pages hold, tokens of the prompt) of each request."""
        numbers: dict[tuple[int, Any], int] = {}
        paths, tokens, parents = [], [], []
        for contents, length in requests:
            before, path = -1, []
            for content in contents:
                key = before, content
                if key not in numbers:
                    numbers[key] = len(parents)
                    parents.append(before)
                before = numbers[key]
                path.append(before)
            paths.append(np.array(path, dtype=np.int32))
            tokens.append(length)
        return cls(paths, np.array(tokens), np.array(parents, dtype=np.int32), page)

    def digests(self) -> NDArray[np.uint64]:
        """(pages,) one for each page."""
        generator = np.random.default_rng(7)
        return generator.integers(1, 1 << 63, len(self.parent), dtype=np.uint64)

    def part(self, chosen: Iterable[int]) -> "Trace":
        """Some of its requests."""
        where = np.fromiter(chosen, dtype=np.int64)
        paths = [self.paths[i] for i in where]
        return Trace(paths, self.tokens[where], self.parent, self.page)


def read(file: Path, block: int) -> Trace:
    """A trace in Mooncake's format."""
    with file.open() as lines:
        records = [json.loads(line) for line in lines]
    return Trace.of(((r["hash_ids"], r["input_length"]) for r in records), block)


def generate(name: str, times: int, seed: int, page: int = 64) -> Trace:
    """Traffic of a shape of ``launch.bench.hits``, with so many times its sessions."""
    shape, active = SHAPES[name]
    shape = dataclasses.replace(shape, sessions=times * shape.sessions)  # type: ignore[type-var]

    def requests() -> Iterable[tuple[Sequence[Any], int]]:
        for prompt, _ in interleave(shape, active, 512, seed):
            whole_pages = len(prompt) // page
            pages = prompt[: whole_pages * page].astype(np.int16).reshape(whole_pages, page)
            yield [contents.tobytes() for contents in pages], len(prompt)

    return Trace.of(requests(), page)
