"""What the cache asks of a storage.

Keys name contents (see ``core.storage.keys``), so to write a page that is there already
changes nothing, and a page that cannot be read whole is a page that is not there.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from sglang_ext.core.storage.keys import Key
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Objects, Persist, Prefetch

FULL, WINDOW = 0, 1
"""Components: pages of full-attention layers, pages of sliding-window layers."""


class PageStore(Protocol):
    """Pages by key. Called from several threads; blocks; may raise anything.

    Whatever it raises counts as a page that is not there, or was not written.
    """

    def resume_points(self, keys: Sequence[Key], window: int) -> list[int]:
        """After how many of ``keys`` a prompt can be resumed, ascending.

        All full-attention pages up to there are stored, from the first key on, and so are
        the last ``window`` sliding-window pages before it (or all of them, if fewer).
        """
        ...

    def has(self, key: Key) -> bool:
        """Whether a full-attention page is stored."""
        ...

    def load(self, component: int, objects: Objects) -> int:
        """Read pages into their host slots; returns how many, from the first one on, are
        there and good. Slots of the others may hold anything."""
        ...

    def store(self, component: int, objects: Objects) -> int:
        """Write pages from their host slots; returns how many, from the first one on, are
        stored."""
        ...

    def use(self, keys: Sequence[Key], windows: Collection[int]) -> None:
        """A prompt's pages were read, or are written next as far as they are not there.

        What is dropped is the least recently used, and of pages that are used together the
        last ones first: a page without those in front of it is of no use.

        Args:
            keys: of its full-attention pages, from the first one on.
            windows: which of them are used with their sliding-window page.
        """
        ...

    def clear(self) -> None:
        """Forget everything. Raises if something is left."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class Storage(Protocol):
    """A page store in the background. Called from one thread; never waits, never raises.

    Operations of a kind end in the order in which they were submitted.
    """

    def submit_lookup(self, prefetch: Prefetch) -> None:
        """Find the resume points of a prompt."""
        ...

    def submit_prefetch(self, prefetch: Prefetch) -> None:
        """Read a prompt, stage by stage, until it is cancelled or a page cannot be read."""
        ...

    def submit_persist(self, persist: Persist) -> None:
        """Write pages, if what is in front of them is stored."""
        ...

    def poll(self, ledger: StorageLedger) -> None:
        """Tell the ledger what has ended since the last call."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Wait until no host memory is read or written any more; False if it still is then.
        Lookups touch none."""
        ...

    def close(self) -> None:
        """Stop the threads and close the page store. What has not begun is dropped."""
        ...
