"""Where the tokens of prompts come from: a tier, or a computation and its cause."""

import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from sglang_ext.adapter.departures import DeparturesSeen
from sglang_ext.adapter.metric_definitions import Cause
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.geometry import Geometry

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_MOST_WAITING = 8192
"""Requests whose match is kept; those that went without an end are forgotten some time."""


class Found(NamedTuple):
    """What a match found for a prompt; all in tokens of it.

    Attributes:
        resume: up to where the request was offered to resume.
        possible: up to where it could resume, if the engine could admit it then.
        known: up to where pages are cached, with windows or without.
    """

    resume: int
    possible: int
    known: int


_NOTHING = Found(0, 0, 0)


class PromptTokens:
    """Counts each prompt once, when its request has ended."""

    def __init__(self, geometry: Geometry, departures: DeparturesSeen) -> None:
        self._page = geometry.page_tokens
        self._window = geometry.window_pages * geometry.page_tokens
        self._departures = departures
        self._found: dict[str, Found] = {}
        self._loaded: dict[str, int] = {}
        self._hits: Counter[tuple[str, str]] = Counter()
        self._computed: Counter[Cause] = Counter()
        self._recomputed: list[int] = []

    def __len__(self) -> int:
        """Requests of which something is kept until they end."""
        return len(self._found | self._loaded)

    def matched(self, request: str, found: Found) -> None:
        """A request that waits was matched; the last match before it runs counts."""
        self._found[request] = found
        if len(self._found) > _MOST_WAITING:
            del self._found[next(iter(self._found))]

    def loads(self, request: str, window_pages: int) -> None:
        """The load of a request has begun, with so many pages of its window."""
        self._loaded[request] = window_pages * self._page
        if len(self._loaded) > _MOST_WAITING:
            del self._loaded[next(iter(self._loaded))]

    def ended(self, req: "Req", rows: Rows) -> None:
        """A request has ended.

        Args:
            rows: its path.
        """
        prompt = len(req.origin_input_ids)
        storage = req.cached_tokens_storage
        tiers = {
            "device": req.cached_tokens_device,
            "host": req.cached_tokens_host,
            "storage": storage,
        }
        cached = min(sum(tiers.values()), prompt)
        for tier, tokens in tiers.items():
            self._hits["full", tier] += tokens
        self._count_window(min(cached, self._window), self._loaded.pop(req.rid, 0), storage)
        found = self._found.pop(req.rid, _NOTHING)
        # a load that was declined leaves less than was offered, and so on
        ends = [min(prompt, end) for end in itertools.accumulate((cached, *found), max)]
        declined, inadmissible, lost = (
            after - before for before, after in itertools.pairwise(ends)
        )
        self._computed[Cause.DECLINED] += declined
        self._computed[Cause.INADMISSIBLE] += inadmissible
        self._computed[Cause.WINDOW_LOST] += lost
        self._recomputed.append(lost)
        self._count_rest(prompt, ends[-1], rows)

    def _count_window(self, window: int, loaded: int, storage: int) -> None:
        # what storage made usable ends where the request resumes, as its window does
        from_host = min(window, loaded)
        from_storage = min(from_host, storage)
        self._hits["swa", "device"] += window - from_host
        self._hits["swa", "host"] += from_host - from_storage
        self._hits["swa", "storage"] += from_storage

    def _count_rest(self, prompt: int, known: int, rows: Rows) -> None:
        """Tokens from ``known`` on: nothing of them was cached."""
        left = prompt - known
        pages = self._departures.come_back(rows[-(-known // self._page) : prompt // self._page])
        for cause in (Cause.EVICTED, Cause.NOT_COPIED):
            tokens = min(left, pages[cause] * self._page)
            self._computed[cause] += tokens
            left -= tokens
        self._computed[Cause.NEW] += left

    def take_hits(self) -> list[tuple[tuple[str, str], int]]:
        """Tokens that were found since the last call, by (component, tier)."""
        taken, self._hits = self._hits, Counter()
        return list(taken.items())

    def take_computed(self) -> list[tuple[Cause, int]]:
        """Tokens that were computed since the last call, by cause."""
        taken, self._computed = self._computed, Counter()
        return list(taken.items())

    def take_recomputed(self) -> list[int]:
        """Tokens that were cached and had no window, for each request since the last call."""
        taken, self._recomputed = self._recomputed, []
        return taken
