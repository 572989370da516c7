"""The host memory of one rank: what fits in it, and which windows it keeps."""

import dataclasses

from sglang_ext.core.host.arena import ArenaShape
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import Recompute
from sglang_ext.planning.table import Row, size


@dataclasses.dataclass(frozen=True, slots=True)
class HostPlan:
    """The host memory of one rank, and what fits in it.

    Attributes:
        bytes: of this rank.
        source: the engine's option that says so.
        token_bytes: of one token of full attention, all layers; 0 for models that have none.
        tokens: of full attention, if nothing else is kept; 0 for models that have none.
        windows: if nothing else is kept.
        window_pages, window_tokens: of one window.
        window_bytes: of one window, all layers.
        spaced_tokens: of full attention, if a window is kept every ``interval`` tokens.
        interval: tokens between windows inside a prompt; 0: none is kept there.
        recompute: what a branch inside a cached prompt costs at most.
    """

    bytes: int
    source: str
    token_bytes: int
    tokens: int
    windows: int
    window_pages: int
    window_tokens: int
    window_bytes: int
    spaced_tokens: int
    interval: int
    recompute: Recompute

    @classmethod
    def of(
        cls, shape: ArenaShape, geometry: Geometry, source: str, recompute: Recompute
    ) -> "HostPlan":
        """What fits in an arena.

        Args:
            source: the option that says how large it is.
            recompute: see ``window.promised``.
        """
        interval = recompute.always
        *full, window = (sum(page) for page in shape.page_bytes)
        room = shape.extents * sum(shape.extent_bytes)
        spaced = 0
        if full and interval:
            unit = full[0] * (interval // geometry.page_tokens) + window * geometry.window_pages
            spaced = room // unit * interval
        return cls(
            bytes=room,
            source=source,
            token_bytes=full[0] // geometry.page_tokens if full else 0,
            tokens=shape.pages(0) * geometry.page_tokens if full else 0,
            windows=shape.pages(len(full)) // geometry.window_pages,
            window_pages=geometry.window_pages,
            window_tokens=geometry.window_pages * geometry.page_tokens,
            window_bytes=geometry.window_pages * window,
            spaced_tokens=spaced,
            interval=interval,
            recompute=recompute,
        )

    def rows(self, ranks: int) -> list[Row]:
        """For a reader; the ranks have as much each."""
        in_all = f", {size(ranks * self.bytes)} on all {ranks} ranks" if ranks > 1 else ""
        window = (
            f"{size(self.window_bytes)} a window of {self.window_tokens:,} tokens "
            f"in {self.window_pages:,} pages"
        )
        fits = [f"{self.windows:,} windows"]
        if self.tokens:
            window = f"{self.token_bytes:,} bytes a token of full attention, {window}"
            fits.insert(0, f"{self.tokens:,} tokens of full attention")
        if self.spaced_tokens:
            fits.append(f"{self.spaced_tokens:,} tokens with a window every {self.interval:,}")
        return [
            ("host memory", f"{size(self.bytes)} a rank ({self.source}){in_all}"),
            ("KV of a rank", window),
            ("room on a rank", " or ".join(fits)),
            ("inside prompts", self._inside()),
        ]

    def _inside(self) -> str:
        if not self.interval:
            return "no window is kept"
        said = f"a window every {self.interval:,} tokens (K)"
        if 0 < self.recompute.with_room < self.interval:
            said += f", every {self.recompute.with_room:,} while there is room"
        return said + "; a branch recomputes no more than that and a page"
