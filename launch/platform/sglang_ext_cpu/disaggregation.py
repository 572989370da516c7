"""Hand-over of KV from a prefill server to a decode server, over Mooncake, without a GPU.

The threads that send wait for CUDA events: for the page numbers of a chunk, which the engine
copies to pinned memory, and for the pass that wrote what is sent early. Here a pass has run when
the call that starts it returns.
"""

import types
from typing import Any

import torch


class _Past:
    """An event of what has been done when it is recorded."""

    def record(self, stream: Any) -> None:
        """Nothing is behind on any stream."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _Torch(types.ModuleType):
    """``torch`` with events that have happened."""

    cuda = types.SimpleNamespace(Event=_Past)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> None:
    """Have page numbers read where they are, and no thread wait for CUDA."""
    from sglang.srt.disaggregation import prefill
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False
    prefill.torch = _Torch("torch")
