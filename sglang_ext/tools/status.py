"""``sglang-ext status --url http://…``: what the cache of a running server holds and finds.

One screen from the server's ``/metrics`` (start it with ``--enable-metrics``), drawn anew every few
seconds. Rates are since the server's start, and since the screen before.
"""

import sys
import time
from collections.abc import Sequence

from sglang_ext.arguments import Parser, number, url
from sglang_ext.planning.table import size
from sglang_ext.tools.scrape import Metrics, ScrapeError, fetch

_TIERS = ("device", "host", "storage")
_FROM_THE_TOP = "\x1b[H\x1b[J"
"""Moves a terminal to its first line and empties it."""


def screen(now: Metrics, before: Metrics | None = None, passed_s: float = 0.0) -> list[str]:
    """Lines of one screen.

    Args:
        before: what the server exported ``passed_s`` seconds earlier; None for the first screen.
    """
    rows = [("requests", _requests(now)), ("found, since start", _found(now, None, 0.0))]
    if before is not None:
        rows.append((f"found, last {passed_s:.0f} s", _found(now, before, passed_s)))
    rows += [
        ("device", _tier(now, "device", _used(now))),
        ("host", _tier(now, "host", _memory(now))),
        ("copied", _copies(now)),
        ("retention", _retention(now)),
        ("storage", _storage(now)),
        ("most recomputed", f"{now.mean('sglang_ext:recompute_max_tokens'):,.0f} tokens below "
                            "a cached prompt in 10 minutes"),
        ("trouble", _trouble(now)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {said}" for name, said in rows]


def _requests(now: Metrics) -> str:
    running, waiting = now.total("sglang:num_running_reqs"), now.total("sglang:num_queue_reqs")
    return f"{running:,.0f} running, {waiting:,.0f} waiting"


def _found(now: Metrics, before: Metrics | None, passed_s: float) -> str:
    """Prompt tokens that were in the cache, by tier."""

    def more(name: str, **labels: str) -> float:
        earlier = 0.0 if before is None else before.total(name, **labels)
        return now.total(name, **labels) - earlier

    prompt = more("sglang:prompt_tokens_total")
    cached = [more("sglang:cached_tokens_total", cache_source=tier) for tier in _TIERS]
    if prompt <= 0:
        return "no prompt"
    tiers = ", ".join(f"{t} {part / prompt:.3f}" for t, part in zip(_TIERS, cached, strict=True))
    speed = f", {prompt / passed_s:,.0f} a second" if passed_s else ""
    return f"{sum(cached) / prompt:.3f} of {prompt:,.0f} prompt tokens{speed} ({tiers})"


def _tier(now: Metrics, tier: str, more: str) -> str:
    full, swa = (
        now.total("sglang_ext:kv_bytes", component=component, tier=tier) / 1e6
        for component in ("full", "swa")
    )
    return f"{full:,.1f} MB of full attention, {swa:,.1f} of windows; {more}"


def _used(now: Metrics) -> str:
    full, swa = now.mean("sglang:full_token_usage"), now.mean("sglang:swa_token_usage")
    return f"requests hold {full:.2f} and {swa:.2f} of the pools"


def _memory(now: Metrics) -> str:
    uses = {
        use: now.total("sglang_ext:host_memory_bytes", use=use)
        for use in ("full", "window", "holes", "free")
    }
    whole = sum(uses.values())
    if not whole:
        return "no host tier"
    parts = ", ".join(f"{use} {size(part)}" for use, part in uses.items())
    return f"{size(whole - uses['free'])} of {size(whole)} ({parts})"


def _copies(now: Metrics) -> str:
    pairs = (("to the host", "backed_up"), ("back", "loaded"))
    said = (
        f"{_tokens(now, event, 'full'):,.0f} tokens and "
        f"{_tokens(now, event, 'swa'):,.0f} of windows {where}"
        for where, event in pairs
    )
    return ", ".join(said)


def _tokens(now: Metrics, event: str, component: str) -> float:
    return now.total("sglang_ext:kv_tokens_total", event=event, component=component)


def _retention(now: Metrics) -> str:
    learned = now.mean("sglang_ext:retention_learned") > 0
    said = "what is expected back stays" if learned else "in the order of the eviction policy"
    price = now.mean("sglang_ext:retention_price_uses")
    sampled = (
        "; only a sample is copied to the host" if now.mean("sglang_ext:host_sampling") else ""
    )
    return f"{said}, price {price:.3g} uses a request{sampled}"


def _storage(now: Metrics) -> str:
    written, read = (_tokens(now, event, "full") for event in ("persisted", "prefetched"))
    files = {
        event: now.total("sglang_ext:storage_files_total", event=event)
        for event in ("missing", "damaged", "foreign", "full", "failed", "removed")
    }
    said = f"{written:,.0f} tokens written, {read:,.0f} read"
    bad = ", ".join(f"{count:,.0f} {event}" for event, count in files.items() if count)
    return f"{said}; files: {bad}" if bad else said


def _trouble(now: Metrics) -> str:
    names = ("failed_transfers", "collisions", "inadmissible")
    counts = {name: now.event(name) for name in names}
    return ", ".join(f"{n.replace('_', ' ')} {c:,.0f}" for n, c in counts.items() if c) or "none"


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: shown; 1: the server tells nothing; 2: an argument is not allowed."""
    parser = Parser(prog="sglang-ext status", description=__doc__)
    parser.add_argument(
        "--url", type=url, required=True, help="of the server, like http://127.0.0.1:30000"
    )
    parser.add_argument("--once", action="store_true", help="one screen, and no more")
    parser.add_argument(
        "--every", type=number(above=0), default=5.0, help="seconds between two screens, default: 5"
    )
    parser.add_argument("--api-key", help="of the server")
    args = parser.parse_args(arguments)
    before, at = None, 0.0
    try:
        while True:
            began = time.monotonic()
            now = fetch(args.url, args.api_key, timeout_s=30.0)
            lines = screen(now, before, began - at)
            if args.once:
                print("\n".join(lines))
                return 0
            print(_FROM_THE_TOP + "\n".join([args.url, *lines]), flush=True)
            before, at = now, began
            time.sleep(args.every)
    except ScrapeError as error:
        print(f"sglang-ext status: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
