"""Hit rates of eviction rules on a trace or on generated traffic, without an engine or memory.

    python -m launch.bench.retention --trace conversation.jsonl --tokens 1e6 2.36e6 6.42e6
    python -m launch.bench.retention --traffic chat --tokens 32768 65536
    python -m launch.bench.retention --trace conversation.jsonl --tokens 1e6 --host-tokens 1.356e6

One cache per capacity and rule; requests one at a time, leaves go first. With a host, what the
device evicts is copied there if admission lets it, and bytes written are counted for each byte
loaded.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.bench.hits import SHAPES
from launch.bench.page_paths import Trace, generate, read
from launch.bench.stress import STRESS, VARIATIONS
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
    (lane,) = order.lanes
    retention = Retention([pages])
    digests = trace.digests()
    taken, hits, learned = 0, 0, 0
    start = time.perf_counter()
    for i, path in enumerate(trace.paths):
        hit = leading(path, lane.__contains__)
        hits += found(trace, i, hit)
        if rule == "lru":
            kinds = np.zeros(len(path), dtype=np.int16)
        else:
            kinds = retention.request(digests[path])
        order.use(path, kinds, i + 1)
        lane.put(path)
        taken += len(path) - hit
        if taken > pages:
            taken -= len(retention.evict(0, order, taken - pages))
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


class TwoTiers:
    """A device and a host of a trace. What is on both is a copy, which goes before all else.

    Args:
        trace: see Trace.
        device, host: tokens.
        rule: see RULES.
    """

    def __init__(self, trace: Trace, device: int, host: int, rule: str) -> None:
        self._trace = trace
        self._device_pages, self._host_pages = device // trace.page, host // trace.page
        self._order = Order(trace.parent, max(map(len, trace.paths)), lanes=2)
        self._device, self._host = self._order.lanes
        self._retention = Retention([self._device_pages, self._device_pages + self._host_pages])
        self._rule = rule
        self._copies: dict[int, None] = {}  # on the host and on the device, oldest first
        self._on_device = self._on_host_alone = 0
        self.hits = self.written = self.loaded = 0

    def request(self, number: int, digests: NDArray[np.uint64]) -> None:
        """One request."""
        path = self._trace.paths[number]
        here = leading(path, self._device.__contains__)
        both = leading(path, lambda row: row in self._device or row in self._host)
        self.hits += found(self._trace, number, both)
        kinds = self._retention.request(digests[path])
        self._order.use(path, kinds, self._retention.tick)
        # pages [here, both) are loaded; from there on they are computed
        for row in reversed(path[here:both].tolist()):
            self._host.remove(row)
            self._on_host_alone -= 1
            self._copies[row] = None
        self.loaded += both - here
        self._device.put(path)
        self._on_device += len(path) - here
        over = self._on_device - self._device_pages
        if over <= 0:
            return
        if self._rule == "lru":
            gone = self._device.oldest(over)
        else:
            gone = self._retention.evict(0, self._order, over)
        self._on_device -= len(gone)
        for row in gone.tolist():
            self._leave(row)

    def _leave(self, row: int) -> None:
        """A page has left the device."""
        if row in self._copies:
            del self._copies[row]
        else:
            if not self._admit(row):
                return
            self.written += 1
            if len(self._copies) + self._on_host_alone >= self._host_pages:
                self._drop()
        self._host.put(np.array([row], dtype=np.int32))
        self._on_host_alone += 1

    def _admit(self, row: int) -> bool:
        if self._host_pages == 0:
            return False
        if self._rule == "lru" or self._host.is_held(row):
            return True  # what is below a page is nothing without it
        return self._retention.worth_admission(1, *self._order.use_of(row))

    def _drop(self) -> None:
        if self._copies:
            del self._copies[next(iter(self._copies))]
            return
        if self._rule == "lru":
            gone = self._host.oldest(1)
        else:
            gone = self._retention.evict(1, self._order, 1)
        self._on_host_alone -= len(gone)


def two_tiers(trace: Trace, device: int, host: int, rule: str) -> dict[str, Any]:
    """Share of tokens found on either, and pages written for each page loaded."""
    tiers, digests = TwoTiers(trace, device, host, rule), trace.digests()
    for i in range(len(trace.paths)):
        tiers.request(i, digests)
    return {
        "device_tokens": device,
        "host_tokens": host,
        "rule": rule,
        "hit_rate": round(tiers.hits / int(trace.tokens.sum()), 4),
        "written_pages": tiers.written,
        "loaded_pages": tiers.loaded,
        "written_per_loaded": round(tiers.written / max(1, tiers.loaded), 2),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=input_file, help="JSON lines in Mooncake's format")
    source.add_argument("--traffic", choices=sorted(SHAPES), help="as in launch.bench.hits")
    source.add_argument("--stress", choices=sorted(STRESS), help="the right rule is known")
    parser.add_argument("--block-size", type=whole(1), default=512, help="tokens of a hash id")
    parser.add_argument("--times", type=whole(1), default=8, help="sessions of --traffic")
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--variation", choices=sorted(VARIATIONS))
    parser.add_argument("--tokens", type=number(above=0, most=1e12), nargs="+", required=True)
    parser.add_argument(
        "--host-tokens",
        type=number(above=0, most=1e12),
        nargs="+",
        help="a host of that size below each device of --tokens",
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--out", type=output_file, help="JSON; default: print only")
    return parser.parse_args(argv)


def trace_of(args: argparse.Namespace) -> Trace:
    """The trace that the command line names."""
    if args.trace:
        trace = read(args.trace, args.block_size)
    elif args.traffic:
        trace = generate(args.traffic, args.times, args.seed)
    else:
        trace = STRESS[args.stress]()
    return VARIATIONS[args.variation](trace) if args.variation else trace


def main() -> None:
    """Replay and print."""
    args = parse_args()
    trace = trace_of(args)
    results = []
    for tokens, rule in itertools.product(map(int, args.tokens), args.rules):
        if args.host_tokens is None:
            results.append(one_tier(trace, tokens, rule))
        else:
            hosts = map(int, args.host_tokens)
            results.extend(two_tiers(trace, tokens, host, rule) for host in hosts)
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
