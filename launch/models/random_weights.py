"""Random weights on which a wrong page shows.

The scale is 1 / sqrt(fan-in), so that activations stay of order one. Queries and keys are larger,
so that a token depends on few positions rather than on the mean of all; a sink weighs about as much
as the tokens of a window.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from launch.models.tiny import write_tokenizer

_STACKED = ("experts.gate_up_proj", "experts.down_proj")
"""Weights of all experts, in the order (expert, input, output)."""
_SHARPENED = ("q_proj.weight", "k_proj.weight")


def save(
    model: Any, out: Path, vocabulary: int, *, embedding: float = 1.0, norms: float = 2.0
) -> Path:
    """Fill a model of Hugging Face, and write it and a tokenizer into ``out``; returns that.

    Args:
        embedding: standard deviation of the token embeddings.
        norms: weights of the norms of queries and keys.
    """
    _fill(model.float(), embedding, norms)
    model.save_pretrained(out)
    write_tokenizer(out, vocabulary)
    return out


def _fill(model: torch.nn.Module, embedding: float, norms: float) -> None:
    """Every parameter in place, each from its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0
            if "embed_tokens" in name:
                scale = embedding
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                scale = norms
            parameter.copy_(scale * drawn(name, parameter.shape))


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter by its name in the checkpoint; float32 of that shape."""
    digest = hashlib.blake2b(f"0 {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    normal = torch.randn(shape, generator=generator)
    if "embed_tokens" in name:
        return normal
    if "sink" in name:
        # the engine has them in this type
        return (normal + 6.0).bfloat16().float()
    if name.endswith("bias"):
        return normal * 0.1
    if len(shape) < 2:
        return torch.ones(shape)
    inputs = shape[-2] if name.endswith(_STACKED) else shape[-1]
    return normal * ((1.5 if name.endswith(_SHARPENED) else 1.0) / math.sqrt(inputs))
