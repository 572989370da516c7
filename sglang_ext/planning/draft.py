"""What the KV of a draft model takes.

The engine gives a draft the model's slots, so its layers are more bytes of the same pages. They lie
in planes of their own, beside those of full attention.
"""

import dataclasses

from sglang_ext.planning.table import size


@dataclasses.dataclass(frozen=True, slots=True)
class DraftShape:
    """Full-attention layers of a draft: all of it, or what one rank has (``on``).

    Attributes:
        layers: with KV.
        kv_heads: of a layer.
        k_width, v_width: of a head.
        dtype_bytes: bytes of one element.
    """

    layers: int
    kv_heads: int
    k_width: int
    v_width: int
    dtype_bytes: int = 2

    @property
    def widths(self) -> tuple[int, int]:
        """Bytes of one token in all layers: (K, V)."""
        row = self.layers * self.kv_heads * self.dtype_bytes
        return row * self.k_width, row * self.v_width

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(self.widths)

    def on(self, ranks: int) -> "DraftShape":
        """See ModelShape."""
        return dataclasses.replace(self, kv_heads=max(1, self.kv_heads // ranks))

    def said(self) -> str:
        """For a reader."""
        return (
            f"{size(self.token_bytes)} of a token of full attention on a rank; "
            f"layers: {self.layers}, heads of KV: {self.kv_heads}"
        )
