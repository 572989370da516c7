"""What KV of latent attention (MLA) with windows takes, from its shape.

A token has one row in each layer, K and V in one and not by head, so every rank has all of it.
"""

import dataclasses

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.planning.table import size


@dataclasses.dataclass(frozen=True, slots=True)
class LatentShape:
    """Layers of each kind, and elements of a token's row in one.

    Attributes:
        full_layers, swa_layers, window: see ``ModelShape``.
        row, swa_row: elements, in full-attention and in sliding-window layers.
        dtype_bytes: bytes of one element.
    """

    full_layers: int
    swa_layers: int
    window: int
    row: int
    swa_row: int
    dtype_bytes: int = 2

    default_swa_ratio = 0.8
    """``--swa-full-tokens-ratio`` where the line has none."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1")

    @property
    def full_token_bytes(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return self.full_layers * self.row * self.dtype_bytes

    @property
    def swa_token_bytes(self) -> int:
        """Bytes of one token in all sliding-window layers."""
        return self.swa_layers * self.swa_row * self.dtype_bytes

    def page_planes(self, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See ModelShape; a page is in one piece."""
        return (tokens * self.full_token_bytes,), (tokens * self.swa_token_bytes,)

    def on(self, ranks: int) -> "LatentShape":
        """What one of so many tensor-parallel ranks has: all."""
        return self

    def geometry(self, page: int) -> Geometry:
        """Pages and windows of an engine that runs with ``--page-size page``."""
        return Geometry(device_page=page, window=self.window - 1)

    def said_of_layers(self) -> str:
        """For a reader."""
        rows = (
            (self.full_layers, "full-attention", self.row),
            (self.swa_layers, "sliding-window", self.swa_row),
        )
        said = [f"{n} {kind} layers of {size(row * self.dtype_bytes)}" for n, kind, row in rows]
        return f"{' and '.join(said)} a token, latent, {self.dtype_bytes} bytes an element"

    def said_of_sharing(self) -> str:
        """What ranks have of a layer, for a reader."""
        return "each has all KV"
