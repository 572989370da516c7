"""What KV of DeepSeek-V4 takes, from its shape.

A page is what the engine's pools have of it (``adapter.deepseek_v4``): compressed KV and its index
for all tokens, KV of windows with the states of the compressors beside it. Nothing of it is by
head, so every rank has all of it.
"""

import dataclasses

from sglang_ext.core.table.geometry import Geometry

_PAGE = 256
"""Tokens: the one size that the engine takes."""
_LATENT = 512
_LATENT_BYTES = 448 + 64 * 2 + 8
"""Of a token's KV: fp8, rotary positions in bf16, scales."""
_ALIGNMENT = 576
"""Bytes that a page of KV is a multiple of."""
_FLOAT = 4
_STATES = 8
"""Of the compressors of C4 for each page; each has KV and scores of two halves."""


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedShape:
    """Layers by what they keep of all tokens; all of them have a window.

    Attributes:
        c4_layers, c128_layers, other_layers: one in 4 tokens, one in 128, nothing.
        window: see ``ModelShape``.
        index_dim: of a token in the index beside C4.
    """

    c4_layers: int
    c128_layers: int
    other_layers: int
    window: int = 129
    index_dim: int = 128

    default_swa_ratio = 0.1
    """``--swa-full-tokens-ratio`` where the line has none."""

    def __post_init__(self) -> None:
        if self.c4_layers + self.c128_layers < 1:
            raise ValueError("there must be layers with compressed KV")

    @property
    def full_page_bytes(self) -> int:
        """Compressed KV of a page of the engine, with its index."""
        index = self.index_dim + self.index_dim // 128 * _FLOAT
        c4 = _page_of(_PAGE // 4) + _PAGE // 4 * index
        return self.c4_layers * c4 + self.c128_layers * _page_of(_PAGE // 128)

    @property
    def swa_page_bytes(self) -> int:
        """KV of windows of a page of the engine, with states."""
        state = _STATES * 2 * 2 * (_LATENT + self.index_dim) * _FLOAT
        layers = self.c4_layers + self.c128_layers + self.other_layers
        return layers * _page_of(_PAGE) + self.c4_layers * state

    def page_planes(self, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See ModelShape; a page is in one piece."""
        pages = tokens // _PAGE
        return (pages * self.full_page_bytes,), (pages * self.swa_page_bytes,)

    @property
    def full_token_bytes(self) -> float:
        """Compressed KV of one token, all layers."""
        return self.full_page_bytes / _PAGE

    @property
    def swa_token_bytes(self) -> float:
        """KV of windows and states of one token, all layers."""
        return self.swa_page_bytes / _PAGE

    def on(self, ranks: int) -> "CompressedShape":
        """What one of so many tensor-parallel ranks has: all."""
        return self

    def geometry(self, page: int) -> Geometry:
        """Pages and windows, whatever ``--page-size`` says."""
        return Geometry(device_page=_PAGE, window=self.window - 1)

    def said_of_layers(self) -> str:
        """For a reader."""
        return (
            f"{self.c4_layers} layers with one token in 4 and an index, {self.c128_layers} with "
            f"one in 128, {self.other_layers} others, all with windows"
        )

    def said_of_sharing(self) -> str:
        """What ranks have of a layer, for a reader."""
        return "each has all KV"


def _page_of(tokens: int) -> int:
    return -(-tokens * _LATENT_BYTES // _ALIGNMENT) * _ALIGNMENT
