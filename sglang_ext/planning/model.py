"""What a model's KV takes, from its shape."""

import dataclasses

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.planning.compressed import CompressedShape
from sglang_ext.planning.latent import LatentShape
from sglang_ext.planning.table import size

_LEAST = {"full_layers": 1, "swa_layers": 1, "window": 2, "kv_heads": 1, "head_dim": 1}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """Layers and heads of a hybrid model: all of it, or what one rank has (``on``).

    Attributes:
        full_layers, swa_layers: layers of each kind.
        window: sliding window; a position reads the ``window - 1`` tokens before it and itself.
        kv_heads, head_dim: of a full-attention layer, ``head_dim`` is the width of K.
        swa_kv_heads, swa_head_dim, swa_v_head_dim: of a sliding-window layer; 0 means the same
            as of the others, for V the same as for K.
        dtype_bytes: bytes of one element.
        v_head_dim: width of V in a full-attention layer, 0 for that of K.
    """

    full_layers: int
    swa_layers: int
    window: int
    kv_heads: int
    head_dim: int
    swa_kv_heads: int = 0
    swa_head_dim: int = 0
    dtype_bytes: int = 2
    v_head_dim: int = 0
    swa_v_head_dim: int = 0

    default_swa_ratio = 0.8
    """``--swa-full-tokens-ratio`` where the line has none."""

    def __post_init__(self) -> None:
        least = {field.name: 0 for field in dataclasses.fields(self)} | {"dtype_bytes": 1} | _LEAST
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")

    @property
    def full_widths(self) -> tuple[int, int]:
        """Bytes of one token in all full-attention layers: (K, V)."""
        row = self.full_layers * self.kv_heads * self.dtype_bytes
        return row * self.head_dim, row * (self.v_head_dim or self.head_dim)

    @property
    def swa_widths(self) -> tuple[int, int]:
        """Bytes of one token in all sliding-window layers: (K, V)."""
        row = self.swa_layers * (self.swa_kv_heads or self.kv_heads) * self.dtype_bytes
        k_width = self.swa_head_dim or self.head_dim
        v_width = self.swa_v_head_dim or self.swa_head_dim or self.v_head_dim or self.head_dim
        return row * k_width, row * v_width

    @property
    def full_token_bytes(self) -> int:
        """Bytes of one token in all full-attention layers."""
        return sum(self.full_widths)

    @property
    def swa_token_bytes(self) -> int:
        """Bytes of one token in all sliding-window layers."""
        return sum(self.swa_widths)

    def page_planes(self, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of so many tokens of each component, in each plane of the host: (K, V)."""
        full, swa = (
            tuple(width * tokens for width in w) for w in (self.full_widths, self.swa_widths)
        )
        return full, swa

    def on(self, ranks: int) -> "ModelShape":
        """What one of so many tensor-parallel ranks has. A rank has at least one head, which it
        then shares with others."""
        return dataclasses.replace(
            self,
            kv_heads=max(1, self.kv_heads // ranks),
            swa_kv_heads=max(1, (self.swa_kv_heads or self.kv_heads) // ranks),
        )

    def geometry(self, page: int) -> Geometry:
        """Pages and windows of an engine that runs with ``--page-size page``."""
        return Geometry(device_page=page, window=self.window - 1)

    def said_of_layers(self) -> str:
        """For a reader."""
        kinds = (
            (self.full_layers, "full-attention", self.full_widths),
            (self.swa_layers, "sliding-window", self.swa_widths),
        )
        said = [f"{n} {kind} layers of {size(sum(widths) / n)}" for n, kind, widths in kinds]
        return f"{' and '.join(said)} a token, {self.dtype_bytes} bytes an element"

    def said_of_sharing(self) -> str:
        """What ranks have of a layer, for a reader."""
        return f"{self.kv_heads} and {self.swa_kv_heads} heads of KV each"


Shape = ModelShape | CompressedShape | LatentShape
PRESETS: dict[str, ModelShape] = {
    # published configurations
    "gpt-oss-20b": ModelShape(12, 12, window=128, kv_heads=8, head_dim=64),
    "gpt-oss-120b": ModelShape(18, 18, window=128, kv_heads=8, head_dim=64),
    "gemma-4-31b": ModelShape(
        10, 50, window=1024, kv_heads=4, head_dim=512, swa_kv_heads=16, swa_head_dim=256
    ),
    "mimo-v2-flash": ModelShape(
        9, 39, window=129, kv_heads=4, head_dim=192, swa_kv_heads=8, v_head_dim=128
    ),
    "llama-4-scout": ModelShape(12, 36, window=8193, kv_heads=8, head_dim=128),
    "llama-4-maverick": ModelShape(12, 36, window=8193, kv_heads=8, head_dim=128),
    "step-3.5-flash": ModelShape(12, 33, window=513, kv_heads=8, head_dim=128),
}
"""All of a model, by its name."""
COMPRESSED = {
    "deepseek-v4-flash": CompressedShape(21, 20, 2),
    "deepseek-v4-pro": CompressedShape(30, 31, 0),
}
"""The same of models whose shape has other fields."""
