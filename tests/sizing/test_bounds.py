"""What a cache of a given size could have found: by hand, and beside every choice there is."""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from sglang_ext.sizing.bounds import Bounds
from sglang_ext.sizing.traffic import Tokens

BLOCK = 4
NOTHING = np.empty(0, dtype=np.int64)
Path = tuple[int, ...]


def prompt(*blocks: int) -> Tokens:
    """So many blocks, and a token that is computed."""
    return np.array([block for block in blocks for _ in range(BLOCK)] + [0])


def bounds(*paths: Path) -> Bounds:
    return Bounds([(prompt(*path), NOTHING) for path in paths], BLOCK, BLOCK)


def blocks_found(rate: float, *paths: Path) -> float:
    return rate * sum(len(prompt(*path)) for path in paths) / BLOCK


def test_what_was_used_last_stays_or_what_is_used_next() -> None:
    """With room for two blocks: LRU has always just lost what comes, MIN keeps one of them."""
    paths: list[Path] = [(1,), (2,), (3,), (1,), (2,), (3,)]
    of = bounds(*paths)
    assert blocks_found(of.lru(2 * BLOCK), *paths) == pytest.approx(0)
    assert blocks_found(of.best(2 * BLOCK), *paths) == pytest.approx(2)
    assert of.lru(3 * BLOCK) == of.best(3 * BLOCK)
    assert blocks_found(of.lru(3 * BLOCK), *paths) == pytest.approx(3)


def test_a_block_is_known_by_what_is_in_front_of_it() -> None:
    paths: list[Path] = [(1, 2), (3, 2)]
    assert bounds(*paths).lru(100 * BLOCK) == bounds(*paths).best(100 * BLOCK) == 0


def test_the_end_of_a_path_leaves_before_its_beginning() -> None:
    paths: list[Path] = [(1, 2, 3), (1, 2, 3)]
    of = bounds(*paths)
    for room in range(4):
        found = [blocks_found(rate, *paths) for rate in (of.lru(room * BLOCK), of.best(room * 4))]
        assert found == pytest.approx([room, room])


def test_one_token_is_computed_and_hits_are_whole_pages() -> None:
    whole = np.arange(2 * BLOCK)
    assert Bounds([(whole, NOTHING)] * 2, BLOCK, 1).lru(100) == 7 / 16
    assert Bounds([(whole, NOTHING)] * 2, BLOCK, 2).lru(100) == 6 / 16
    # what is behind the last whole block is a block if it has a page
    assert Bounds([(whole[:7], NOTHING)] * 2, BLOCK, 2).lru(100) == 6 / 14
    assert Bounds([(whole[:7], NOTHING)] * 2, BLOCK, 4).lru(100) == 4 / 14


def test_answers_are_kept_if_their_tokens_are_known() -> None:
    first, answer = prompt(1)[:-1], prompt(2)[:-1]
    follows = np.concatenate((first, answer, [7]))
    told = Bounds([(first, answer), (follows, NOTHING)], BLOCK, BLOCK)
    assert told.best(8) == 8 / 13
    assert told.best(4) == told.lru(4) == 4 / 13
    unknown = Bounds([(first, -answer), (follows, NOTHING)], BLOCK, BLOCK)
    assert unknown.best(100) == 4 / 13


def test_nothing_was_requested() -> None:
    assert Bounds([], BLOCK, BLOCK).lru(10) == Bounds([], BLOCK, BLOCK).best(10) == 0


def prefixes(blocks: set[Path], room: int) -> Iterator[frozenset[Path]]:
    """What of these blocks, each named by its whole path, can be kept."""
    for count in range(min(room, len(blocks)) + 1):
        for kept in itertools.combinations(blocks, count):
            if all(len(block) == 1 or block[:-1] in kept for block in kept):
                yield frozenset(kept)


def most_found(paths: list[Path], room: int) -> int:
    """Blocks found by the best of all choices."""
    states = {frozenset[Path](): 0}
    for path in paths:
        blocks = [path[: depth + 1] for depth in range(len(path))]
        after: dict[frozenset[Path], int] = {}
        for cached, found in states.items():
            hits = sum(block in cached for block in blocks)
            for kept in prefixes(set(cached) | set(blocks), room):
                after[kept] = max(after.get(kept, 0), found + hits)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_finds_more_than_min(seed: int) -> None:
    rng = random.Random(seed)
    paths = [
        tuple(rng.randrange(2) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(3, 7))
    ]
    room = rng.randint(1, 4)
    of = bounds(*paths)
    best = blocks_found(of.best(room * BLOCK), *paths)
    assert best == pytest.approx(most_found(paths, room))
    assert blocks_found(of.lru(room * BLOCK), *paths) <= best + 1e-9
