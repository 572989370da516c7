"""LoRA on a CPU: the engine pins what it copies to a GPU, which PyTorch refuses without one."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "empty", "zeros", "ones", "arange")


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return factory(*args, **options)

    return make


class Torch(types.ModuleType):
    """``torch``, whose host tensors are never pinned."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return _unpinned(found) if name in _FACTORIES else found


def install() -> None:
    """Plain memory in the place of pinned memory, in the engine's LoRA modules."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    for module in (layers, torch_backend):
        module.torch = Torch("torch")
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
