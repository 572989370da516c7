"""Recorded traffic: JSON lines of token ids, or the Mooncake trace format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_ext.sizing.traffic import Tokens

MOONCAKE_BLOCK = 512
"""Tokens behind one hash id in the traces published with Mooncake."""


class TraceError(Exception):
    """A line that is not a request; says which one and why."""


def read(path: Path) -> Iterator[tuple[Tokens, Tokens]]:
    """Requests of a trace in their order: (prompt, answer), int64 token ids.

    A line is an object with ``input_ids`` and, where it is known, ``output_ids``; or, in
    the Mooncake format, with ``hash_ids``, ``input_length`` and ``output_length``. There
    equal ids are equal blocks of tokens, and nothing is known about the answers: their
    tokens occur nowhere else.

    Raises:
        TraceError: a line of another kind.
    """
    unknown = 0
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if "hash_ids" in entry:
                    yield _mooncake_prompt(entry), _unknown(unknown, entry["output_length"])
                    unknown += int(entry["output_length"])
                else:
                    yield _tokens(entry["input_ids"]), _tokens(entry.get("output_ids", []))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise TraceError(f"{path}, line {number}: {error!r}") from error


def _tokens(ids: Any) -> Tokens:
    tokens = np.array(ids, dtype=np.int64)
    if tokens.ndim != 1:
        raise ValueError("token ids must be a list of integers")
    return tokens


def _mooncake_prompt(entry: dict[str, Any]) -> Tokens:
    blocks, length = _tokens(entry["hash_ids"]), int(entry["input_length"])
    if len(blocks) != -(-length // MOONCAKE_BLOCK):
        raise ValueError(f"{len(blocks)} hash ids for {length} tokens")
    return (blocks[:, None] * MOONCAKE_BLOCK + np.arange(MOONCAKE_BLOCK)).reshape(-1)[:length]


def _unknown(start: int, count: int) -> Tokens:
    """Tokens ``[start, start + count)`` of those that no prompt has."""
    return -1 - np.arange(start, start + count, dtype=np.int64)
