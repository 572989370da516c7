"""What a storage tier may take, whether there is one, and whether it may be written now."""

from collections.abc import Callable, Hashable

from sglang_ext.core.storage.keys import Key, namespace_seed
from sglang_ext.core.storage.plan import StorageLimits

FIRST_PAUSE_MS = 100
"""Storage is left alone for so long when a persist has failed; then twice as long, if one fails
that was tried after that."""
_LONGEST_PAUSE_MS = 10_000


class Attachment:
    """The storage tier of a cache. It goes on across a flush.

    Attributes:
        limits: None while there is no storage.
        is_suspended: nothing is looked for and nothing written, until storage is attached again.
        seed: what the keys of a namespace begin with.
        next_persist, next_prefetch: numbers of the next operations.
        paused_until: nothing is written before this time, in ms.
    """

    def __init__(self) -> None:
        self.limits: StorageLimits | None = None
        self.is_suspended = False
        self.seed: Callable[[Hashable], Key] = namespace_seed
        self.next_persist = self.next_prefetch = 0
        self.paused_until = 0
        self._pause_ms = FIRST_PAUSE_MS

    @property
    def is_there(self) -> bool:
        """Whether there is storage."""
        return self.limits is not None

    @property
    def is_broken(self) -> bool:
        """Whether the last write has failed."""
        return self._pause_ms != FIRST_PAUSE_MS

    def attach(self, limits: StorageLimits) -> None:
        """There is storage from now on."""
        self.limits = limits
        self.is_suspended = False
        self._pause_ms, self.paused_until = FIRST_PAUSE_MS, 0

    def detach(self) -> None:
        """There is no storage any more."""
        self.limits = None
        self.is_suspended = False

    def suspend(self) -> None:
        """See ``is_suspended``."""
        self.is_suspended = True

    def name_namespaces(self, seed: Callable[[Hashable], Key]) -> None:
        """Let the keys of a namespace begin with something else; before there are any."""
        self.seed = seed

    def number_persist(self) -> int:
        """A number for a persist."""
        self.next_persist += 1
        return self.next_persist - 1

    def number_prefetch(self) -> int:
        """A number for a lookup and its prefetch."""
        self.next_prefetch += 1
        return self.next_prefetch - 1

    def note_write(self, now_ms: int, *, ok: bool) -> None:
        """A persist has ended."""
        if ok:
            self._pause_ms = FIRST_PAUSE_MS
            return
        if now_ms < self.paused_until:
            return  # it was on its way when another one failed: both have met the same trouble
        self.paused_until = now_ms + self._pause_ms
        self._pause_ms = min(2 * self._pause_ms, _LONGEST_PAUSE_MS)
