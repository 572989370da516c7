"""The storage tier of one rank: requests that wait for it, and what it does in each step."""

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Hashable, Sequence

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.plan import DeclineReason
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Prefetch, StorageLimits
from sglang_ext.core.table.digest import Pages
from sglang_ext.storage.background import BackgroundStorage

logger = logging.getLogger(__name__)

_HANGS_AFTER_MS = 30_000
"""Storage that has not ended an operation for so long is left alone, whatever the policy."""
_GIVEN_UP_MOST = 3
"""So many requests in a row wait in vain; then none does before storage has answered one in
time."""
_MOST_SECONDS_TO_DRAIN = 60.0
_MOST_WAITS = 256
"""Of requests, kept for whoever asks."""
POLICIES = ("best_effort", "wait_complete", "timeout")


@dataclasses.dataclass(frozen=True, slots=True)
class Patience:
    """How long a request waits for storage.

    Attributes:
        policy: one of POLICIES, as the engine names them: not at all, to the end, or for
            ``base_ms`` and ``per_1024_tokens_ms`` for each 1,024 tokens that are looked for.
    """

    policy: str
    base_ms: float
    per_1024_tokens_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """A prefetch that somebody waits for, and for how long."""

    plan: Prefetch
    since_ms: int
    deadline_ms: float


class StorageTier:
    """Storage for one cache.

    Attributes:
        patience: may be changed while the server runs.

    Args:
        storage: the storage in the background.
        limits: of host memory for it.
    """

    def __init__(
        self,
        index: PrefixCache,
        storage: BackgroundStorage,
        limits: StorageLimits,
        patience: Patience,
    ) -> None:
        self.patience = patience
        self._index = index
        self._limits = limits
        self._storage = storage
        self._ledger = StorageLedger(index)
        self._page_tokens = index.geometry.page_tokens
        self._start = time.monotonic()
        self._waiting: dict[Hashable, Waiting] = {}
        self._waits: deque[float] = deque(maxlen=_MOST_WAITS)
        self._given_up = 0
        self._probe: Waiting | None = None
        index.attach_storage(limits)

    # ---- requests ------------------------------------------------------------

    def prefetch(self, request: Hashable, pages: Pages, namespace: Hashable) -> None:
        """Look for a prompt in storage while its request waits."""
        self.forget(request)
        if self._probe is not None:
            self._index.counters.declined[DeclineReason.STORAGE_BACKLOG] += 1
            return
        plan = self._index.prefetches.look_up(pages, namespace)
        if not isinstance(plan, Prefetch):
            return
        self._storage.submit_lookup(plan)
        now, patience = self._ledger.now_ms, self.patience
        tokens = (plan.limit - plan.resume) * self._page_tokens
        wait = patience.base_ms + patience.per_1024_tokens_ms * tokens / 1024
        waiting = Waiting(plan, now, now + wait)
        if self._given_up >= _GIVEN_UP_MOST:
            self._probe = waiting
        else:
            self._waiting[request] = waiting

    def is_ready(self, request: Hashable) -> bool:
        """Whether a request need not wait for storage any longer."""
        waiting = self._waiting.get(request)
        if waiting is None or self._is_over(waiting.plan):
            return True
        now, policy = self._ledger.now_ms, self.patience.policy
        hangs = now - waiting.since_ms > _HANGS_AFTER_MS
        if hangs or (policy == "timeout" and now >= waiting.deadline_ms):
            self._given_up += waiting.plan.op in self._index.prefetches.lookups
        elif policy != "best_effort":
            return False
        self._index.prefetches.cancel(waiting.plan.op)
        return True

    def _is_over(self, plan: Prefetch) -> bool:
        if plan.op in self._index.prefetches.lookups:
            return plan.cancelled
        whole = plan.published == len(plan.stages)
        return plan.cancelled or whole or plan.op not in self._index.prefetches.reading

    def pop_loaded(self, request: Hashable) -> tuple[int, int | None]:
        """(tokens that storage made usable, where they begin) of a request; once."""
        waiting = self._waiting.pop(request, None)
        if waiting is None:
            return 0, None
        self._waits.append((self._ledger.now_ms - waiting.since_ms) / 1000)
        if waiting.plan.published == 0:
            return 0, None
        plan = waiting.plan
        return (plan.end - plan.resume) * self._page_tokens, plan.resume * self._page_tokens

    def take_waits(self) -> list[float]:
        """Seconds that requests have waited that were scheduled since the last call."""
        return [self._waits.popleft() for _ in range(len(self._waits))]

    def ask(self, pages: Pages, namespace: Hashable, *, read: bool) -> Waiting | None:
        """Look for a prompt that no request has; None: there is too little to gain, or too much is
        looked for.

        Args:
            read: bring what there is to the host; otherwise only say what there is.
        """
        plan = self._index.prefetches.look_up(pages, namespace, asks_only=not read)
        if not isinstance(plan, Prefetch):
            return None
        self._storage.submit_lookup(plan)
        return Waiting(plan, self._ledger.now_ms, math.inf)

    def is_answered(self, asked: Waiting) -> bool:
        """Whether nothing more comes of it; storage that hangs is not waited for."""
        if self._ledger.now_ms - asked.since_ms > _HANGS_AFTER_MS:
            self._index.prefetches.cancel(asked.plan.op)
        return self._is_over(asked.plan)

    def forget(self, request: Hashable) -> None:
        """A request has gone, or begins anew."""
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            self._index.prefetches.cancel(waiting.plan.op)

    # ---- each step -----------------------------------------------------------

    def report(self) -> list[int]:
        """This rank's part of the collective; see StorageLedger."""
        self._storage.poll(self._ledger)
        return self._ledger.report(int((time.monotonic() - self._start) * 1000))

    def commit(self, agreed: Sequence[int]) -> None:
        """Apply what all ranks agree on, and start what follows from it."""
        for prefetch in self._ledger.commit(agreed):
            self._given_up = 0
            self._ledger.begun(prefetch)
            self._storage.submit_prefetch(prefetch)
        for persist in self._index.persists.begin(self._ledger.now_ms):
            self._storage.submit_persist(persist)
        self._judge_probe()

    def _judge_probe(self) -> None:
        """Wait for storage again when it has answered in time."""
        probe, now = self._probe, self._ledger.now_ms
        if probe is None:
            return
        if probe.plan.op not in self._index.prefetches.lookups:
            self._probe = None
            if now <= probe.deadline_ms:
                self._given_up = 0
        elif now - probe.since_ms > _HANGS_AFTER_MS:
            self._index.prefetches.cancel(probe.plan.op)

    @property
    def is_writing(self) -> bool:
        """Whether something waits to be written, by a storage that can."""
        return bool(self._index.persists.writing) or self._index.persists.has_more

    @property
    def is_busy(self) -> bool:
        """Whether anything is looked for, read or written, or waits to be written."""
        return self._index.n_storage_operations > 0 or self._index.persists.has_more

    # ---- life cycle ----------------------------------------------------------

    def give_up(self) -> None:
        """End what is in flight as soon as possible, done or not, until ``go_on``. On every rank
        in the same step."""
        self._index.prefetches.cancel_all()
        self._storage.writes = False

    def go_on(self) -> None:
        """Write again."""
        self._storage.writes = True

    def drain(self) -> bool:
        """Let reads and writes end here; False: they hang."""
        return self._storage.drain(_MOST_SECONDS_TO_DRAIN)

    def reset(self) -> None:
        """Forget everything; for a flush, before the index is reset. Nothing is in flight, so
        nothing is waited for."""
        for waiting in self._waiting.values():
            waiting.plan.cancelled = True
        self._waiting.clear()
        self._probe = None
        assert self.drain(), "storage reads or writes host memory that a flush hands out again"
        self._storage.poll(self._ledger)
        self._ledger.reset()

    def suspend(self) -> None:
        """Let requests go on without storage; see ``PrefixCache.suspend_storage``."""
        self._index.suspend_storage()
        self._probe = None

    def resume(self) -> None:
        """Go on as before; the host's pages are what storage takes them for."""
        self._index.attach_storage(self._limits)

    @property
    def is_suspended(self) -> bool:
        """Whether nothing is looked for and nothing is written."""
        return self._index.attachment.is_suspended

    def clear(self) -> bool:
        """Forget everything that is stored."""
        done = self._storage.clear()
        self._index.persists.forget_stored()
        return done

    def save_alone(self) -> bool:
        """Write what waits, at shutdown: this rank no longer waits for the others. False: there
        is nothing left to write."""
        self._storage.poll(self._ledger)
        self.commit(self._ledger.report(int((time.monotonic() - self._start) * 1000)))
        return self.is_writing

    def close(self) -> None:
        """Release the storage."""
        self._storage.close()
