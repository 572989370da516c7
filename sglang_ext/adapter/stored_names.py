"""How a namespace is called in storage.

The engine appends the id of a request's adapter to its extra key. Such an id is drawn anew
whenever an adapter is loaded while the server runs, and for ``--lora-paths`` it is made of name
and path alone. In storage an adapter goes by its contents instead.
"""

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from sglang_ext.core.storage.keys import Key, namespace_seed

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter

_ID = 32
"""Characters of an adapter's id."""
_SCALED = "|elastic_ep_size="
"""The engine may put this and a number behind the id."""


class StoredNames:
    """Seeds of namespaces.

    Args:
        adapters: those that are loaded, by id. Their tensors are read once each.
    """

    def __init__(self, adapters: Mapping[str, "LoRAAdapter"]) -> None:
        self._adapters = adapters
        # an id is never given to another adapter
        self._known: dict[str, bytes] = {}

    def seed(self, namespace: Hashable) -> Key:
        """See ``storage_keys.namespace_seed``; the engine's own where there is no adapter."""
        extra = namespace[0] if isinstance(namespace, tuple) else None
        if extra is None:
            return namespace_seed(namespace)
        key, scaled, size = extra.partition(_SCALED)
        contents = self._contents(key[-_ID:])
        if contents is None:
            return namespace_seed(namespace)
        assert isinstance(namespace, tuple)
        digest = hashlib.sha256(b"sglang-ext-adapter-v1" + contents)
        digest.update(namespace_seed((key[:-_ID] + scaled + size, *namespace[1:])))
        return digest.digest()

    def _contents(self, adapter_id: str) -> bytes | None:
        found = self._known.get(adapter_id)
        if found is None and (adapter := self._adapters.get(adapter_id)) is not None:
            found = self._known[adapter_id] = contents(adapter)
        return found


def contents(adapter: "LoRAAdapter") -> bytes:
    """16 bytes that differ where two adapters do: all of their tensors, and how they apply."""
    digest = hashlib.blake2b(digest_size=16)
    config = json.dumps(adapter.config.hf_config, sort_keys=True, default=_plain)
    digest.update(f"{adapter.scaling} {config}".encode())
    for name, tensor in _tensors(adapter):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(xxhash.xxh3_128_digest(tensor.reshape(-1).view(torch.uint8).numpy().data))
    return digest.digest()


def _tensors(adapter: "LoRAAdapter") -> Iterator[tuple[str, torch.Tensor]]:
    parts = [layer.weights for layer in adapter.layers]
    for part in [*parts, adapter.embedding_layers, adapter.added_tokens_embeddings]:
        for name in sorted(part):
            yield name, part[name].detach().cpu()


def _plain(value: Any) -> Any:
    """Sets have no order of their own."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
