"""What a model keeps of each page, as its pools on the device have it."""

from collections.abc import Sequence
from typing import Protocol

from sglang_ext.adapter.drafts import DraftLayers
from sglang_ext.adapter.host_kv import HostKv


class ModelKv(Protocol):
    """A model's KV in the engine's pools."""

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Of each component that has KV, windows last."""
        ...

    @property
    def drafts(self) -> Sequence[DraftLayers]:
        """Layers of drafts that are copied with a part of a page."""
        ...

    def build_host(self) -> HostKv:
        """The host tier's memory, as large as the engine's options say.

        Raises:
            StartupError: see ``host_kv.build_memory``.
        """
        ...
