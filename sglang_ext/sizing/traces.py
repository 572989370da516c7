"""Recorded traffic: JSON lines of token ids, or the format of the Mooncake and Qwen traces."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_ext.sizing.traffic import Tokens

MOONCAKE_BLOCK = 512
"""Tokens behind one hash id in the traces published with Mooncake."""
QWEN_BLOCK = 16
"""The same in those published by Qwen (Bailian)."""
_LONGEST = 1 << 24
"""Tokens of one prompt or answer; more is a mistake."""
_VOCABULARY = 1 << 31
"""Token ids lie below; tokens of blocks, whose texts nobody knows, are numbered from here on."""


class TraceError(Exception):
    """A trace that cannot be replayed; says which line and why."""


def read(path: Path, block: int = MOONCAKE_BLOCK) -> Iterator[tuple[Tokens, Tokens]]:
    """Requests of a trace in their order: (prompt, answer), int64 token ids.

    A line is an object with ``input_ids`` and, where it is known, ``output_ids``; or, in
    the Mooncake format, with ``hash_ids``, ``input_length`` and ``output_length``. There
    equal ids are equal blocks of tokens, and nothing is known about the answers: their
    tokens occur nowhere else.

    Args:
        block: tokens behind one hash id.

    Raises:
        TraceError: a line of another kind, or a file that cannot be read.
    """
    return _read(path, _Requests(block))


def _read(path: Path, requests: "_Requests") -> Iterator[tuple[Tokens, Tokens]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    request = requests.parse(line)
                except (ValueError, RecursionError) as error:
                    raise TraceError(f"{path}, line {number}: {error}") from error
                yield request
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What a trace is.

    Attributes:
        requests: how many there are.
        hashed: whether blocks have hash ids, so that prompts share whole blocks or nothing.
    """

    requests: int
    hashed: bool


def check(path: Path, block: int = MOONCAKE_BLOCK) -> Summary:
    """Read a trace to its end.

    Raises:
        TraceError: see ``read``; or there is no request in it.
    """
    requests = _Requests(block)
    count = sum(1 for _ in _read(path, requests))
    if count == 0:
        raise TraceError(f"{path}: there is no request in it")
    return Summary(count, requests.hashed)


class _Requests:
    """Turns lines into requests; knows the blocks and answers of those before.

    Hash ids may be of any size, so they are numbered as they come.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._numbers: dict[int, int] = {}
        self._unknown = 0

    @property
    def hashed(self) -> bool:
        """Whether there was a hash id."""
        return bool(self._numbers)

    def parse(self, line: bytes) -> tuple[Tokens, Tokens]:
        """(prompt, answer) of a line; ValueError says what is wrong with it."""
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("not an object")  # noqa: TRY004
        if "hash_ids" in entry:
            prompt = self._prompt(entry)
            return prompt, self._answer(_length(entry, "output_length", 0))
        if "input_ids" not in entry:
            raise ValueError("neither input_ids nor hash_ids")
        prompt = _token_ids(entry, "input_ids")
        if len(prompt) == 0:
            raise ValueError("input_ids is empty")
        return prompt, _token_ids(entry, "output_ids")

    def _prompt(self, entry: dict[str, Any]) -> Tokens:
        ids, length = _numbers(entry, "hash_ids"), _length(entry, "input_length", 1)
        blocks = -(-length // self._block)
        if len(ids) != blocks:
            raise ValueError(
                f"{len(ids)} hash_ids for {length} tokens in blocks of {self._block}"
                + self._better_block(len(ids), length)
            )
        known = self._numbers
        numbers = [known.setdefault(name, len(known)) for name in ids]
        starts = _VOCABULARY + np.array(numbers, dtype=np.int64) * self._block
        tokens: Tokens = (starts[:, None] + np.arange(self._block)).reshape(-1)[:length]
        return tokens

    def _better_block(self, ids: int, length: int) -> str:
        fitting = [size for size in (QWEN_BLOCK, MOONCAKE_BLOCK) if -(-length // size) == ids]
        return f"; --block-size {fitting[0]} fits" if fitting else ""

    def _answer(self, count: int) -> Tokens:
        """Tokens that no prompt has, and no other answer."""
        first = self._unknown
        self._unknown += count
        return -1 - np.arange(first, first + count, dtype=np.int64)


def _length(entry: dict[str, Any], name: str, least: int) -> int:
    value = entry.get(name)
    if type(value) is not int or not least <= value <= _LONGEST:
        shown = str(value)[:40]
        raise ValueError(f"{name} {shown} is not a whole number from {least} to {_LONGEST}")
    return value


def _numbers(entry: dict[str, Any], name: str) -> list[int]:
    ids = entry.get(name, [])
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise ValueError(f"{name} is not a list of whole numbers")
    return ids


def _token_ids(entry: dict[str, Any], name: str) -> Tokens:
    ids = _numbers(entry, name)
    if ids and not (min(ids) >= 0 and max(ids) < _VOCABULARY):
        raise ValueError(f"{name} has an id below 0 or from {_VOCABULARY} on")
    return np.array(ids, dtype=np.int64)
