"""One page of one prefix, as the model of the cache knows it."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator

from sglang_ext.core.table.digest import Pages

Key = tuple[Hashable, bytes]
ABSENT, RESERVED, READY = range(3)
Order = Callable[["ModelPage"], tuple[int, int, int]]
States = dict[Key, tuple[int, ...]]
"""State of the four copies of each page, in the order of TIERS."""
TIERS = ("device", "host", "swa_device", "swa_host")
UNUSED, INSIDE, USED = range(3)
"""What a window is worth: nobody resumes from it, it is inside a prompt, it was used."""


@dataclasses.dataclass
class ModelPage:
    """One page of one prefix."""

    depth: int
    parent: Key | None
    device: int = ABSENT
    host: int = ABSENT
    swa_device: int = ABSENT
    swa_host: int = ABSENT
    rank: int = 0
    used: int = 0
    priority: int = -(1 << 63) - 1  # less than any: no request has used it
    longest: int = 0
    forks: int = 0
    requests: list[int] = dataclasses.field(default_factory=list)
    band: int = UNUSED
    window_used: int = 0
    resume: bool = False

    @property
    def states(self) -> tuple[int, ...]:
        """In the order of TIERS."""
        return self.device, self.host, self.swa_device, self.swa_host

    @property
    def has_window(self) -> bool:
        """Whether a request can read it, after a load if need be."""
        return bool(self.swa_device) or self.swa_host == READY

    def use_window(self, clock: int) -> None:
        """A request may resume after the page, or so soon after it that it reads its window."""
        self.band, self.window_used = USED, max(self.window_used, clock)

    def keep_window(self) -> None:
        """It lies near the end of a prompt: it goes with its page, if nobody resumes after it."""
        if self.band != USED:
            before = self.window_used if self.band == INSIDE else 0
            self.band, self.window_used = INSIDE, max(before, self.used)

    def worth(self, clock: int) -> tuple[int, float]:
        """What the host goes by: by policy, then uses for the time since the last one."""
        return self.rank, min(1 + self.forks, 255) / (clock - self.used + 1)

    def count(self, request: int, priority: int, pages: int) -> bool:
        """A request whose prefix has so many pages uses the page; whether it is another one than
        the last."""
        self.priority = max(self.priority, priority)
        self.longest = max(self.longest, pages)
        if self.requests and self.requests[-1] == request:
            return False
        self.requests.append(request)
        return True

    def ranked(self, policy: str, spare_pages: int) -> int:
        """What a policy thinks of the page now, by its definition."""
        return {
            "lru": 0,
            "learned": 0,
            "lfu": min(2047, len(self.requests)),
            "slru": int(len(self.requests) >= 2),
            "priority": self.priority,
            "sessions": 0,  # nobody opens one
            "tlru": int(self.depth < self.longest - spare_pages),
        }[policy]


def page_order(page: ModelPage) -> tuple[int, int, int]:
    """Eviction order of pages: by policy, then least recently used first, then the deepest."""
    return page.rank, page.used, -page.depth


def window_order(page: ModelPage) -> tuple[int, int, int]:
    """The same of sliding-window copies: by what they are worth, and so on."""
    return page.band, page.window_used, -page.depth


def prefix_keys(pages: Pages, namespace: Hashable) -> Iterator[Key]:
    """Keys of the pages of a prefix, the first one first."""
    for end in range(1, len(pages) + 1):
        yield namespace, pages[:end].tobytes()
