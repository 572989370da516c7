"""What the engine's kernels do in place, and has to be done in place without them.

Llama 4 rotates its queries and keys by positions and goes on with the tensors that it gave away:
with the engine's plain form, which returns others, it would know no positions at all. Gemma 4 caps
its logits in a Triton kernel, wherever the platform is not the engine's own CPU.
"""

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_ROTATION = "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native"
_CAP = "sglang.kernels.ops.activation.softcap._softcap_logits"


def _rotate(
    original: Any,
    rotation: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    rotated: tuple[torch.Tensor, torch.Tensor]
    rotated = original(rotation, positions, query, key, *args, **kwargs)
    for given, result in zip((query, key), rotated, strict=True):
        given.copy_(result)
    return rotated


def _cap(
    logits: torch.Tensor, bound: float | None, output: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of any shape, none of them beyond ``bound``; into ``output`` instead if there is one,
    float32 of the same shape."""
    capped = logits if bound is None else bound * torch.tanh(logits / bound)
    return (logits if output is None else output).copy_(capped)


def install() -> None:
    """Hook the plain rotation, and replace the kernel."""
    HookRegistry.register(_ROTATION, _rotate, HookType.AROUND)
    HookRegistry.register(_CAP, _cap, HookType.REPLACE)
