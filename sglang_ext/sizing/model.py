"""What a model's KV cache takes, from its shape."""

import dataclasses

from sglang_ext.core.table.geometry import Geometry


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """Layers and heads of a hybrid model, of one tensor-parallel rank.

    Attributes:
        full_layers, swa_layers: layers of each kind.
        window: sliding window as models give it; a position reads the ``window - 1``
            tokens before it and itself.
        kv_heads, head_dim: of a full-attention layer; K and V are equally wide.
        swa_kv_heads, swa_head_dim: of a sliding-window layer; 0 means the same.
        dtype_bytes: bytes of one element.
    """

    full_layers: int
    swa_layers: int
    window: int
    kv_heads: int
    head_dim: int
    swa_kv_heads: int = 0
    swa_head_dim: int = 0
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        least = {"full_layers": 1, "swa_layers": 1, "window": 2, "kv_heads": 1, "head_dim": 1}
        least |= {"swa_kv_heads": 0, "swa_head_dim": 0, "dtype_bytes": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")

    @property
    def full_token_bytes(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return 2 * self.full_layers * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def swa_token_bytes(self) -> int:
        """Bytes of one token in all sliding-window layers."""
        heads, dim = self.swa_kv_heads or self.kv_heads, self.swa_head_dim or self.head_dim
        return 2 * self.swa_layers * heads * dim * self.dtype_bytes

    def geometry(self, page: int) -> Geometry:
        """Pages and windows of an engine that runs with ``--page-size page``."""
        return Geometry(device_page=page, window=self.window - 1)


PRESETS = {
    # published configurations; one rank holds all heads
    "gpt-oss-20b": ModelShape(12, 12, window=128, kv_heads=8, head_dim=64),
    "gpt-oss-120b": ModelShape(18, 18, window=128, kv_heads=8, head_dim=64),
    # ten full layers of wide heads, fifty sliding-window layers
    "gemma-like": ModelShape(
        10, 50, window=1024, kv_heads=4, head_dim=512, swa_kv_heads=16, swa_head_dim=256
    ),
}
"""Shapes known by name."""
