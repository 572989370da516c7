"""Attention that torch_native lacks: sinks, windows that are chunks, and drafts.

gpt-oss and MiMo-V2 give the softmax one more logit for each head, a sink that takes part of the
weight and has no value. Llama 4's layers with rotary positions read the chunk that a position is
in, instead of the tokens before it. A server that drafts tokens computes them in batches whose
lengths are not those of the requests, and reads trees of them. All of it is computed here in plain
PyTorch, one request after another. Other layers stay with the engine's own code.

The engine has lists of backends that serve a model, and torch_native is on none of them: for
gpt-oss and Gemma 4 it takes ``triton``. So this platform's backend has that name too, unless
the engine's own is asked for (``triton_attention``).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_CHUNK = "ext_attention_chunk"
_DRAFTS = "ext_attention_of_drafts"
AHEAD = "ext_tokens_ahead"
"""A backend's attribute: how many drafts it computes ahead of the request, its own among them."""


class _Request(NamedTuple):
    """One request of a batch, as one layer sees it.

    Attributes:
        slots: of the K and V of its tokens, in order, in the layer's pool.
        positions: of its new tokens, which are the last of them.
        ancestors: the tokens that each new one goes on from, itself among them: (new, all), bool.
            None where these are the tokens before it: everywhere but in a tree of drafts.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    ancestors: torch.Tensor | None = None


def _note(original: Any, backend: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    original(backend, model_runner, *args, **kwargs)
    setattr(backend, _CHUNK, model_runner.model_config.attention_chunk_size)
    setattr(backend, _DRAFTS, model_runner.spec_algorithm.is_speculative())


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
    both_ways = _reads_both_ways(layer)
    if sinks is None and chunk is None and not getattr(backend, _DRAFTS):
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
    for request in _requests(backend, layer, forward_batch):
        end = begin + len(request.positions)
        keys, values = (
            buffer[request.slots].to(q.dtype)
            for buffer in backend.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        logits = torch.einsum("qhgd,khd->hgqk", queries[begin:end], keys)
        seen = _seen(request, layer.sliding_window_size, chunk, both_ways=both_ways)
        logits = (logits * layer.scaling).masked_fill_(~seen, float("-inf"))
        read = torch.einsum("hgqk,khd->qhgd", _weights(logits, sink), values)
        output[begin:end] = read.flatten(1)
        begin = end
    return output


def _reads_both_ways(layer: Any) -> bool:
    """Whether the tokens that a layer computes together read each other, those behind them too."""
    from sglang.srt.layers.radix_attention import AttentionType

    return layer.attn_type is AttentionType.ENCODER_ONLY


def _in_window_pool(backend: Any, layer: Any) -> bool:
    """Whether a layer's K and V are in slots of their own. The backend's pool is looked at anew: a
    draft without KV of its own has the pool of its target while it computes."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool = backend.token_to_kv_pool
    return isinstance(pool, SWAKVPool) and bool(pool.layers_mapping[layer.layer_id][1])


def _save(backend: Any, layer: Any, forward_batch: Any, k: torch.Tensor, v: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool, slots = backend.token_to_kv_pool, forward_batch.out_cache_loc
    in_window = _in_window_pool(backend, layer)
    # the backend has translated those of the batch, but each draft of a chain has others
    window_slots = pool.translate_loc_from_full_to_swa(slots) if in_window else None
    pool.set_kv_buffer(layer, KVWriteLoc(slots, window_slots), k, v)


def _requests(backend: Any, layer: Any, forward_batch: Any) -> Iterator[_Request]:
    in_window = _in_window_pool(backend, layer)
    pool, rows = backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token
    trees = _trees(forward_batch)
    for row, length, new in zip(
        forward_batch.req_pool_indices.tolist(),
        (forward_batch.seq_lens + _ahead(backend, forward_batch)).tolist(),
        _new_tokens(forward_batch),
        strict=True,
    ):
        slots = rows[row, :length].long()
        # what the window has left behind reads the padding slot 0, which is masked
        slots = pool.full_to_swa_index_mapping[slots] if in_window else slots
        if trees is None:
            yield _Request(slots, torch.arange(length - new, length, device=slots.device))
        else:
            ancestors = next(trees)
            yield _Request(slots, ancestors.sum(dim=1) - 1, ancestors)


def _ahead(backend: Any, forward_batch: Any) -> int:
    """How many of the tokens that have K and V now the lengths of requests leave out."""
    if forward_batch.forward_mode.is_target_verify():
        drafts: int = forward_batch.spec_info.draft_token_num
        return drafts
    ahead: int = getattr(backend, AHEAD, 0) if forward_batch.forward_mode.is_decode() else 0
    return ahead


def _new_tokens(forward_batch: Any) -> list[int]:
    """How many tokens of each request are computed."""
    if forward_batch.forward_mode.is_target_verify():
        return [forward_batch.spec_info.draft_token_num] * len(forward_batch.req_pool_indices)
    if forward_batch.forward_mode.is_decode():
        return [1] * len(forward_batch.req_pool_indices)
    counts: list[int] = forward_batch.extend_seq_lens.tolist()
    return counts


def _trees(forward_batch: Any) -> Iterator[torch.Tensor] | None:
    """Ancestors of the drafts of each request, None if they are no trees."""
    drafts = forward_batch.spec_info
    if not forward_batch.forward_mode.is_target_verify() or drafts.custom_mask is None:
        return None
    if drafts.tree_topk == 1:
        return None
    new = drafts.draft_token_num
    lengths = [length + new for length in forward_batch.seq_lens.tolist()]
    masks = drafts.custom_mask[: new * sum(lengths)].split([new * length for length in lengths])
    return (mask.view(new, -1) for mask in masks)


def _seen(request: _Request, window: int, chunk: int | None, *, both_ways: bool) -> torch.Tensor:
    """Which of its tokens each of the new ones of a request reads: (new, all), bool.

    Args:
        window: tokens before itself that one reads; all if it is below zero.
        chunk: it reads no token of an earlier multiple of so many.
        both_ways: it reads the new ones behind it too: a block that is drafted at once.
    """
    keys = torch.arange(len(request.slots), device=request.slots.device)
    queries = request.positions[:, None]
    if both_ways:
        seen = torch.ones_like(keys <= queries)
    elif request.ancestors is None:
        seen = keys <= queries
    else:
        keys[-len(queries) :] = request.positions
        seen = request.ancestors.clone()
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
    HookRegistry.register(f"{_BACKEND}.__init__", _note, HookType.AROUND)
    for name in ("forward_extend", "forward_decode"):
        HookRegistry.register(f"{_BACKEND}.{name}", _attend, HookType.AROUND)


def name_backend() -> None:
    """Give the backend its second name."""
    from sglang.srt.layers.attention import attention_registry

    backends = attention_registry.ATTENTION_BACKENDS
    backends["triton"] = backends["torch_native"]
