"""The engine's own Triton attention (``EXT_CPU_ATTENTION=triton``, ``--attention-backend triton``).

It is Python and Triton alone. On a GPU it is compiled, and CUDA graphs of decode steps can be
taken. On a CPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``), in float32: the
interpreter's bfloat16 and fp8 are not those of a GPU.

The engine's deterministic mode asks for a platform that it knows before it replaces matrix
products by ones that do not depend on the batch. On a GPU it is told that this is CUDA. On a CPU
PyTorch's products stay, for interpreted ones take minutes; attention is deterministic there too.

A token that is decoded reads one token less than its window: the backend counts the token itself
among those before it. A prompt's tokens read all. So KV would depend on whether a token was
decoded or was part of a prompt, and a cache could not be held beside no cache.
"""

import importlib
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_ext_cpu import on_gpu

_OPERATORS = "sglang.srt.batch_invariant_ops"
_BACKEND = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"


def _count_the_token_itself(original: Any, backend: Any, *args: Any, **kwargs: Any) -> None:
    """A whole window for a token that is decoded. What a prompt would read beyond its window, the
    kernel masks by the layer's own size."""
    original(backend, *args, **kwargs)
    if backend.sliding_window_size is not None and backend.sliding_window_size > 0:
        backend.sliding_window_size += 1


def name_backend() -> None:
    """Leave the name ``triton`` to the engine, with whole windows; let its deterministic mode
    start."""
    HookRegistry.register(f"{_BACKEND}.__init__", _count_the_token_itself, HookType.AROUND)
    if on_gpu():
        operators = importlib.import_module(f"{_OPERATORS}.batch_invariant_ops")
        operators.get_dispatch_device_backend = lambda: "CUDA"  # type: ignore[attr-defined]
    else:
        package = importlib.import_module(_OPERATORS)
        package.enable_batch_invariant_mode = lambda: None  # type: ignore[attr-defined]
