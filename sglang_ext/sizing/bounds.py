"""Bounds of the hit rate: what a cache of a given size would have found in recorded requests,
with LRU, and with the requests to come known (Belady's MIN).

A cache is here a set of blocks of tokens, each known by all tokens up to its end. A block is
found when those in front of it are, and leaves after those behind it.
"""

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile

import numpy as np

from sglang_ext.sizing.traffic import Tokens

_NEVER = -1


class Bounds:
    """Requests as paths of numbered blocks.

    Answers are kept like prompts, except those of which no trace knows the tokens (ids below 0):
    no prompt has them.

    Args:
        requests: (prompt, answer) in their order.
        block: tokens of a block; what is left of a request behind its last whole block is one
            more, which takes as much room, if it has a page.
        page: hits are counted in whole pages, and one token of a prompt is computed.
    """

    def __init__(self, requests: Iterable[tuple[Tokens, Tokens]], block: int, page: int) -> None:
        self._block = block
        self._paths: list[list[int]] = []
        self._findable: list[int] = []
        self._prompt = 0
        numbers: dict[tuple[int, bytes], int] = {}
        for prompt, answer in requests:
            known = np.concatenate((prompt, answer)) if (answer >= 0).all() else prompt
            path, last = [], -1
            for tokens in _blocks(known, block, page):
                name = last, hashlib.blake2b(tokens, digest_size=16).digest()
                last = numbers.setdefault(name, len(numbers))
                path.append(last)
            self._paths.append(path)
            self._findable.append((len(prompt) - 1) // page * page)
            self._prompt += len(prompt)
        self._next_uses = _next_uses(self._paths, len(numbers))

    def lru(self, tokens: int) -> float:
        """Part of the prompts' tokens that LRU finds in a cache of so many tokens."""
        room, found = tokens // self._block, 0
        cached: OrderedDict[int, None] = OrderedDict()
        for number, path in enumerate(self._paths):
            hits = sum(1 for _ in takewhile(cached.__contains__, path))
            found += self._found(number, hits)
            # the last block of a path is the first to go
            for block in reversed(path):
                cached[block] = None
                cached.move_to_end(block)
            while len(cached) > room:
                cached.popitem(last=False)
        return found / max(1, self._prompt)

    def best(self, tokens: int) -> float:
        """The same of MIN: no choice of what to keep finds more blocks.

        It keeps what is used again soonest. No block is used again before those in front of it,
        so the one with the latest next use, and of these the deepest, has none behind it.
        """
        room, found = tokens // self._block, 0
        # a block is named by its next use: (request, depth) as one number
        depths = max(map(len, self._paths), default=0)
        cached: set[int] = set()
        latest: list[int] = []
        for number, next_uses in enumerate(self._next_uses):
            names = range(number * depths, number * depths + len(next_uses))
            hits = sum(1 for _ in takewhile(cached.__contains__, names))
            found += self._found(number, hits)
            cached.difference_update(names)
            for depth, use in enumerate(next_uses):
                if use != _NEVER:
                    cached.add(name := use * depths + depth)
                    heapq.heappush(latest, -name)
            while len(cached) > room:
                # a name that was used is not there any more
                cached.discard(-heapq.heappop(latest))
        return found / max(1, self._prompt)

    def _found(self, number: int, hits: int) -> int:
        return min(hits * self._block, self._findable[number])


def _blocks(tokens: Tokens, block: int, page: int) -> Tokens:
    """(n, block) tokens, the last ones followed by an id that no token has."""
    left = len(tokens) % block
    if left < page:
        return tokens[: len(tokens) - left].reshape(-1, block)
    padding = np.full(block - left, np.iinfo(np.int64).min)
    return np.concatenate((tokens, padding)).reshape(-1, block)


def _next_uses(paths: list[list[int]], blocks: int) -> list[list[int]]:
    """For each block of each path the number of the next path that has it, or ``_NEVER``."""
    last, uses = [_NEVER] * blocks, []
    for number in reversed(range(len(paths))):
        path = paths[number]
        uses.append([last[block] for block in path])
        for block in path:
            last[block] = number
    return uses[::-1]
