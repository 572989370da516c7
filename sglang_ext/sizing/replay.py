"""Replay of requests, one at a time, against the cache's own index.

What the engine does to the cache is done in its order: match, load, lock, prefill in
chunks, checkpoint, back up, decode, finish. Copies end at once, so the figures are
those of a host that is never the bottleneck; requests do not compete for the device.
"""

import dataclasses

import numpy as np

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.device.victims import Spare
from sglang_ext.core.eviction_policy import POLICIES
from sglang_ext.core.host.arena import Arena, shape_for
from sglang_ext.core.host.tier import HostTier
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.plan import Hold, Transfer, TransferKind
from sglang_ext.core.table.columns import ABSENT, Rows, Slots
from sglang_ext.core.table.window import checkpoint_pages, dense_pages, window_cost
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.planning.model import Shape
from sglang_ext.sizing.pools import CountedDevicePool, NoBytes
from sglang_ext.sizing.traffic import Tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """Memory of the tiers.

    Attributes:
        device_pages, device_window_pages: table pages of each component.
        host_bytes: of both components together; 0 means no host tier.
    """

    device_pages: int
    device_window_pages: int
    host_bytes: int


@dataclasses.dataclass(slots=True)
class Result:
    """What a replay has counted. Sizes in tokens where nothing else is said.

    Attributes:
        prompt: tokens of all prompts.
        from_device, from_host: tokens that were not computed, by where they were found.
        again: tokens computed although their full-attention KV was cached: what a
            missing sliding window costs.
        most_again: the most of it in one request.
        written_bytes, loaded_bytes: copied between host and device.
        rejected: requests that did not fit the device.
        pages: table pages that were ever computed and inserted.
    """

    requests: int = 0
    prompt: int = 0
    from_device: int = 0
    from_host: int = 0
    again: int = 0
    most_again: int = 0
    written_bytes: int = 0
    loaded_bytes: int = 0
    rejected: int = 0
    pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Part of the prompts' tokens that was not computed."""
        return (self.from_device + self.from_host) / max(1, self.prompt)


class Replay:
    """One cache under one budget and policy.

    Args:
        page: the engine's ``--page-size``.
        chunk: tokens that are prefilled at a time.
        eviction: by the engine's name.
        checkpoint_tokens: between windows inside a prompt; None derives it from the model.
    """

    def __init__(
        self,
        model: Shape,
        budget: Budget,
        policy: WritePolicy,
        page: int = 64,
        chunk: int = 8192,
        eviction: str = "lru",
        checkpoint_tokens: int | None = None,
    ) -> None:
        self.geometry = model.geometry(page)
        self._page = self.geometry.page_tokens
        self._chunk = chunk
        self._full_page_bytes, self._window_page_bytes = map(sum, model.page_planes(self._page))
        self._pool = CountedDevicePool(
            budget.device_pages, budget.device_window_pages, self.geometry
        )
        sizes = self._full_page_bytes, self._window_page_bytes
        page_bytes = tuple((size // 2, size // 2) for size in sizes)
        shape = shape_for(budget.host_bytes, page_bytes, self.geometry.slots_per_page)
        tier = None
        if shape.extents:
            tier = HostTier.on(Arena(shape), NoBytes())
        interval = checkpoint_pages(self.geometry, page_bytes, checkpoint_tokens)
        backups = BackupPolicy.for_device(
            policy,
            interval,
            budget.device_pages,
            budget.device_window_pages,
            shape.pages(0),
            dense_pages(self.geometry, page_bytes, interval),
            window_cost=window_cost(self.geometry, page_bytes),
        )
        self.index = PrefixCache(
            self.geometry,
            budget.device_pages + shape.pages(0),
            self._pool,
            tier,
            backups,
            POLICIES[eviction],
            Spare.for_device(
                budget.device_pages, budget.device_window_pages, has_host=tier is not None
            ),
        )
        self._counted = Result()

    def result(self) -> Result:
        """What has been counted so far."""
        done, full, window = self.index.counters, self._full_page_bytes, self._window_page_bytes
        return dataclasses.replace(
            self._counted,
            written_bytes=done.backed_up_pages * full + done.backed_up_window_pages * window,
            loaded_bytes=done.loaded_pages * full + done.loaded_window_pages * window,
        )

    def serve(self, prompt: Tokens, answer: Tokens) -> None:
        """One request, from its arrival to its end."""
        counted, index = self._counted, self.index
        counted.requests += 1
        counted.prompt += len(prompt)
        rows = self._resume(prompt)
        repeat = (len(prompt) - 1) // self._page
        request = _Request(rows, index.hold(rows), counted.requests, repeat)
        tokens = np.concatenate((prompt, answer))
        stops = [
            *range(len(rows) * self._page + self._chunk, len(prompt), self._chunk),
            len(prompt),
        ]
        for stop in (*stops, len(tokens)):
            if not self._extend(request, tokens, stop, decoding=stop > len(prompt)):
                counted.rejected += 1
                break
        request.lock.release()

    def _resume(self, prompt: Tokens) -> Rows:
        """The path to go on from, loaded if it has to be."""
        counted, index = self._counted, self.index
        # one token must be left to compute
        pages = self._pages(prompt, len(prompt) - 1)
        match = index.match_and_use(pages, None)
        rows = match.rows
        if match.device_pages < len(rows):
            on_device = rows[: match.device_pages]
            admission = index.hold(on_device)
            plan = index.begin_load(rows)
            admission.release()
            if isinstance(plan, Transfer):
                index.commit_load(plan.op)
            else:
                rows = on_device
        counted.from_device += match.device_pages * self._page
        counted.from_host += (len(rows) - match.device_pages) * self._page
        again = (len(index.table.lookup(pages, None)) - len(rows)) * self._page
        counted.again += again
        counted.most_again = max(counted.most_again, again)
        return rows

    def _extend(self, request: "_Request", tokens: Tokens, stop: int, *, decoding: bool) -> bool:
        """Compute up to ``stop`` and hand whole pages to the index; False without room."""
        index, first = self.index, len(request.rows)
        count = stop // self._page
        new = -(-stop // self._page) - first
        slots = self._allocate(new)
        if slots is None:
            return False
        full, swa = slots
        if decoding:
            # what left the window while its request decoded was given back on the way
            kept = self.geometry.retained_tokens + self._page
            dead = min(new, max(0, (stop - kept) // self._page - first))
            self._pool.release_window(full[:dead], swa[:dead].copy())
            swa[:dead] = ABSENT
        own = count - first
        self._pool.release_window(full[own:], swa[own:])
        self._pool.release(full[own:])
        if own > 0:
            self._insert(request, self._pages(tokens, stop), full[:own], swa[:own])
        for plan in index.demote_ahead():
            index.commit_backup(plan.op, ok=True)
        return True

    def _allocate(self, pages: int) -> tuple[Slots, Slots] | None:
        pool = self._pool
        self.index.evict_device(pages - pool.free_pages(), pages - pool.free_window_pages())
        if min(pool.free_pages(), pool.free_window_pages()) < pages:
            return None
        full, swa = pool.allocate(pages), pool.allocate_window(pages)
        assert full is not None
        assert swa is not None
        return full, swa

    def _insert(self, request: "_Request", pages: Tokens, full: Slots, swa: Slots) -> None:
        index, first = self.index, len(request.rows)
        rows = index.insert(pages, None, first, full, swa, request.number)
        self._counted.pages += len(rows) - first
        if first <= request.repeat <= len(rows):
            index.note_prompt_end(rows, request.repeat)
        lock = index.hold(rows)
        request.lock.release()
        request.lock, request.rows = lock, rows
        if index.host_tier is not None:
            plan = index.begin_backup(rows)
            if isinstance(plan, Transfer):
                index.commit_backup(plan.op, ok=True)
        assert not index.pending[TransferKind.BACKUP]

    def _pages(self, tokens: Tokens, stop: int) -> Tokens:
        """The whole pages of the first ``stop`` tokens."""
        count = max(0, stop) // self._page
        return tokens[: count * self._page].reshape(count, self._page)


@dataclasses.dataclass(slots=True)
class _Request:
    """A running request: the path that belongs to the index, its lock, and the pages after
    which its prompt would be resumed if it came again."""

    rows: Rows
    lock: Hold
    number: int
    repeat: int
