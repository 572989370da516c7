"""Pools of the engine for latent attention with windows, on a CPU."""

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from tests.adapter.deepseek_v4 import PAGE

FULL_LAYERS, WINDOW_LAYERS = [1, 3], [0, 2, 4]


def full_attention_pool(tokens: int, window_tokens: int) -> Any:
    """Of a model without windows; K and V."""
    return MHATokenToKVPool(
        tokens, PAGE, torch.bfloat16, head_num=2, head_dim=64, layer_num=3, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip


def latent_pool(tokens: int, window_tokens: int) -> Any:
    """As the engine makes it; with two widths of rows."""
    common = {"page_size": PAGE, "device": "cpu", "enable_memory_saver": False}
    return SWAKVPool(
        size=tokens,
        size_swa=window_tokens,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=0,
        head_dim=0,
        swa_attention_layer_ids=WINDOW_LAYERS,
        full_attention_layer_ids=FULL_LAYERS,
        device="cpu",
        full_kv_pool_class=MLATokenToKVPool,
        swa_kv_pool_class=MLATokenToKVPool,
        full_kv_pool_kwargs={**common, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        swa_kv_pool_kwargs={**common, "kv_lora_rank": 256, "qk_rope_head_dim": 64},
    )
