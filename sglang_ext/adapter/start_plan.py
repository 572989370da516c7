"""What a server is going to do with its memory, in one line of its log."""

import dataclasses

from sglang_ext.core.host.arena import ArenaShape
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import Recompute


@dataclasses.dataclass(frozen=True, slots=True)
class HostPlan:
    """The host memory of one rank, and what fits in it.

    Attributes:
        bytes: of this rank.
        source: the engine's option that says so.
        tokens: of full attention, if nothing else is kept; 0 for models that have none.
        windows: if nothing else is kept.
        window_tokens: of one window, in whole pages.
        spaced_tokens: of full attention, if a window is kept every ``interval`` tokens.
        interval: tokens between windows inside a prompt; 0: none is kept there.
        recompute: what a branch inside a cached prompt costs at most.
    """

    bytes: int
    source: str
    tokens: int
    windows: int
    window_tokens: int
    spaced_tokens: int
    interval: int
    recompute: Recompute

    @classmethod
    def of(
        cls, shape: ArenaShape, geometry: Geometry, budget: tuple[int, str], recompute: Recompute
    ) -> "HostPlan":
        """What fits in an arena.

        Args:
            budget: (bytes, the option that says so).
            recompute: see ``window.promised``.
        """
        (size, source), interval = budget, recompute.always
        window_tokens = geometry.window_pages * geometry.page_tokens
        *full, window = (sum(page) for page in shape.page_bytes)
        room = shape.extents * sum(shape.extent_bytes)
        spaced = 0
        if full and interval:
            unit = full[0] * (interval // geometry.page_tokens) + window * geometry.window_pages
            spaced = room // unit * interval
        return cls(
            bytes=size,
            source=source,
            tokens=shape.pages(0) * geometry.page_tokens if full else 0,
            windows=shape.pages(len(full)) // geometry.window_pages,
            window_tokens=window_tokens,
            spaced_tokens=spaced,
            interval=interval,
            recompute=recompute,
        )

    def describe(self, ranks: int) -> str:
        """For a reader; the ranks have as much each."""
        in_all = f", {_size(ranks * self.bytes)} on all {ranks} ranks" if ranks > 1 else ""
        fits = [f"{self.tokens:,} tokens of full attention"] if self.tokens else []
        fits.append(f"{self.windows:,} windows of {self.window_tokens:,} tokens")
        if self.spaced_tokens:
            fits.append(f"{self.spaced_tokens:,} tokens with a window every {self.interval:,}")
        inside = f"a window every {self.interval:,} tokens" if self.interval else "none"
        if 0 < self.recompute.with_room < self.interval:
            inside += f", every {self.recompute.with_room:,} while there is room"
        if self.interval:
            inside += ", so that a branch recomputes no more than that and a page"
        return (
            f"{_size(self.bytes)} of host memory a rank ({self.source}){in_all}, one memory for "
            f"both kinds of layers: room for {' or '.join(fits)}; kept inside prompts: {inside}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@dataclasses.dataclass(frozen=True, slots=True)
class StartPlan:
    """All that was decided at start.

    Attributes:
        host: None for a cache on the device alone.
        ranks: of the server, each with host memory of its own.
        policies: of writing and of eviction, by the engine's names.
        copies: who copies between device and host.
        storage: the backend and whose pages it has; None without one.
    """

    host: HostPlan | None
    ranks: int
    policies: tuple[str, str]
    copies: str
    storage: str | None

    def line(self) -> str:
        """For the log."""
        write, eviction = self.policies
        if self.host is None:
            return (
                f"on the device alone (--enable-hierarchical-cache adds the host), "
                f"eviction {eviction}"
            )
        return "; ".join(
            (
                self.host.describe(self.ranks),
                f"write policy {write}, eviction {eviction}",
                f"copies: {self.copies}",
                f"storage: {self.storage or 'none'}",
            )
        )
