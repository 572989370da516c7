"""Hit rates of eviction rules on a trace or on generated traffic, without an engine or memory.

    python -m launch.bench.retention --trace conversation.jsonl --tokens 1e6 2.36e6 6.42e6
    python -m launch.bench.retention --shape chat --share 0.05 0.1 0.2
    python -m launch.bench.retention --trace conversation.jsonl --device-tokens 1e6 \\
        --host-tokens 1.356e6

One cache per capacity and rule; requests one at a time, leaves go first. With a host, what the
device evicts is copied there if admission lets it, and bytes written are counted for each byte
loaded.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.bench.stress import STRESS, VARIATIONS
from launch.bench.trace import Trace, generate, read
from sglang_ext.arguments import Parser, input_file, number, output_file, whole
from sglang_ext.core.retention.order import Order
from sglang_ext.core.retention.retention import Retention

RULES = ("lru", "learned")
_RESUME = 64
"""A prompt is resumed at multiples of this, and its last token is computed."""


def found(trace: Trace, request: int, pages: int) -> int:
    """Tokens of a prompt that need not be computed if so many pages are there."""
    length = int(trace.tokens[request])
    return min(pages * trace.page, max(0, length - 1) // _RESUME * _RESUME)


def leading(path: NDArray[np.int32], is_there: Callable[[int], bool]) -> int:
    """How many of the first pages are there."""
    low, high = 0, len(path)
    # leaves go first: what is there is a prefix
    while low < high:
        middle = (low + high) // 2
        if is_there(int(path[middle])):
            low = middle + 1
        else:
            high = middle
    return low


def one_tier(trace: Trace, tokens: int, rule: str) -> dict[str, Any]:
    """Share of tokens found by one cache."""
    pages = max(1, tokens // trace.page)
    longest = max(map(len, trace.paths))
    order = Order(trace.parent, longest)
    retention = Retention([pages])
    digests = trace.digests()
    taken, hits, learned = 0, 0, 0
    start = time.perf_counter()
    for i, path in enumerate(trace.paths):
        hit = leading(path, order.__contains__)
        hits += found(trace, i, hit)
        if rule == "lru":
            kinds = np.zeros(len(path), dtype=np.int16)
        else:
            kinds = retention.request(digests[path])
        order.use(path, kinds, i + 1)
        taken += len(path) - hit
        if taken > pages:
            if rule == "always":
                gone = order.cheapest(taken - pages, retention.estimate, i + 1)
            else:
                gone = retention.evict(0, order, taken - pages)
            taken -= len(gone)
        learned += retention.learned(0)
    result = {
        "tokens": tokens,
        "rule": rule,
        "hit_rate": round(hits / int(trace.tokens.sum()), 4),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if rule == "learned":
        result["share_of_requests_learned"] = round(learned / len(trace.paths), 3)
    return result
