"""Attention that torch_native lacks: sinks, and windows that are chunks.

gpt-oss and MiMo-V2 give the softmax one more logit for each head, a sink that takes part of the
weight and has no value. Llama 4's layers with rotary positions read the chunk that a position is
in, instead of the tokens before it. Both are computed here in plain PyTorch, one request after
another. Other layers stay with the engine's own code.

The engine has lists of backends that serve a model, and torch_native is on none of them: for
gpt-oss and Gemma 4 it takes ``triton``. So this platform's backend has that name too, unless
the engine's own is asked for (``triton_attention``).
"""

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_CHUNK = "ext_attention_chunk"


def _note_chunk(original: Any, backend: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    original(backend, model_runner, *args, **kwargs)
    setattr(backend, _CHUNK, model_runner.model_config.attention_chunk_size)


def _attend(
    original: Any,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer of a batch: (tokens, heads * width of V), in the type of ``q``.

    Args:
        sinks: a logit for each of the heads, or None.
    """
    chunk = getattr(backend, _CHUNK) if layer.use_irope else None
    if sinks is None and chunk is None:
        plain: torch.Tensor = original(backend, q, k, v, layer, forward_batch, save_kv_cache)
        return plain
    if save_kv_cache and k is not None:
        _save(backend, layer, forward_batch, k, v)
    heads, shared = layer.tp_q_head_num, layer.tp_q_head_num // layer.tp_k_head_num
    # queries that share a head of K and V are rows of one product
    queries = q.reshape(-1, layer.tp_k_head_num, shared, layer.qk_head_dim)
    sink = None if sinks is None else sinks.to(q.dtype).view(-1, shared, 1, 1)
    output = q.new_empty((queries.shape[0], heads * layer.v_head_dim))
    begin = 0
    for slots, new in _requests(backend, layer, forward_batch):
        keys, values = (
            buffer[slots].to(q.dtype)
            for buffer in backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        logits = torch.einsum("qhgd,khd->hgqk", queries[begin : begin + new], keys)
        seen = _seen(len(slots), new, layer.sliding_window_size, chunk, q.device)
        logits = (logits * layer.scaling).masked_fill_(~seen, float("-inf"))
        read = torch.einsum("hgqk,khd->qhgd", _weights(logits, sink), values)
        output[begin : begin + new] = read.flatten(1)
        begin += new
    return output


def _save(backend: Any, layer: Any, forward_batch: Any, k: torch.Tensor, v: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    slots = KVWriteLoc(forward_batch.out_cache_loc, backend.swa_out_cache_loc)
    backend.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)


def _requests(backend: Any, layer: Any, forward_batch: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """(slots of its tokens in the layer's pool, how many of them are new) of each request."""
    lengths = forward_batch.seq_lens.tolist()
    if forward_batch.forward_mode.is_decode():
        new = [1] * len(lengths)
    else:
        new = forward_batch.extend_seq_lens.tolist()
    pool = backend.token_to_kv_pool
    in_window = backend.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]
    rows = backend.req_to_token_pool.req_to_token
    for row, length, count in zip(
        forward_batch.req_pool_indices.tolist(), lengths, new, strict=True
    ):
        slots = rows[row, :length].long()
        # what the window has left behind reads the padding slot 0, which is masked
        yield (pool.full_to_swa_index_mapping[slots] if in_window else slots), count


def _seen(
    length: int, new: int, window: int, chunk: int | None, device: torch.device
) -> torch.Tensor:
    """Which of ``length`` tokens each of the last ``new`` of them reads: (new, length), bool.

    Args:
        window: tokens before itself that one reads; all if it is below zero.
        chunk: it reads no token of an earlier multiple of so many.
    """
    keys = torch.arange(length, device=device)
    queries = keys[length - new :, None]
    seen = keys <= queries
    if window >= 0:
        seen &= keys >= queries - window
    if chunk is not None:
        seen &= keys >= queries // chunk * chunk
    return seen


def _weights(logits: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys, the last dimension.

    Args:
        sink: a logit for each head, in the same dimensions, or None.
    """
    if sink is None:
        return torch.softmax(logits, dim=-1)
    sink = sink.expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]


def install() -> None:
    """Hook the backend."""
    HookRegistry.register(f"{_BACKEND}.__init__", _note_chunk, HookType.AROUND)
    for name in ("forward_extend", "forward_decode"):
        HookRegistry.register(f"{_BACKEND}.{name}", _attend, HookType.AROUND)


def name_backend() -> None:
    """Give the backend its second name."""
    from sglang.srt.layers.attention import attention_registry

    backends = attention_registry.ATTENTION_BACKENDS
    backends["triton"] = backends["torch_native"]
