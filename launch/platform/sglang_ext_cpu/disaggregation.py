"""Hand-over of KV from a prefill server to a decode server, over Mooncake, without a GPU.

The engine copies the page numbers of a chunk to pinned memory. The threads that send wait for CUDA
events: for those numbers, and for the pass that wrote what is sent early. Here copies are made and
passes have run when the calls that start them return.

Mooncake's own module is left alone. It loads the engine's metrics, which need a variable that is
not set yet.
"""

import types
from typing import Any

from sglang_ext_cpu.pinned import Torch


class _Past:
    """An event of what has been done when it is recorded."""

    def record(self, stream: Any) -> None:
        """Nothing is behind on any stream."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def install() -> None:
    """Plain memory and no CUDA, in the engine's module of prefill servers."""
    from sglang.srt.disaggregation import prefill

    module = Torch("torch")
    module.cuda = types.SimpleNamespace(Event=_Past, current_stream=lambda: None)
    prefill.torch = module
