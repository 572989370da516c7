"""A tiny DFLASH draft for MiMo-V2: it drafts a block at once, and the tokens of a block read each
other, those behind them too.

Its KV of a prompt is made of hidden states of the target's layers. It has sinks and scales V, as
MiMo's has, and a layer of each kind: one reads everything, the other a window of tokens before it.
Embedding and head are the target's.
"""

import json
from pathlib import Path
from typing import Any

import torch

from launch.models import mimo_v2, random_weights
from launch.models.tiny import SPECIAL_TOKENS, write_tokenizer

HIDDEN, VOCAB = mimo_v2.HIDDEN, mimo_v2.VOCAB
MLP, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 128, 8, 4, 128, 128
KINDS = ["full_attention", "sliding_attention"]
"""Of the layers."""
READ = [1, 3, 4]
"""Layers of the target whose hidden states the draft reads."""
BLOCK = 4
"""Tokens that are verified together: the last one of a request, and the drafts behind it."""


def _config() -> dict[str, Any]:
    """What is in ``config.json``."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": len(KINDS),
        "layer_types": KINDS,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "block_size": BLOCK,
        "num_target_layers": len(mimo_v2.WINDOWS),
        "dflash_config": {
            "target_layer_ids": READ,
            # a token that no prompt of the tests has
            "mask_token_id": 1,
            "attention_sink_bias": True,
            "attention_value_scale": 0.707,
        },
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
        "torch_dtype": "float32",
    }


def _weights() -> dict[str, torch.Tensor]:
    """By name, as in a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, len(READ) * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    for layer in range(len(KINDS)):
        name = f"layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.post_attention_layernorm.weight": (HIDDEN,),
            f"{name}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{name}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{name}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"{name}.self_attn.attention_sink_bias": (HEADS,),
            f"{name}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{name}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, MLP),
        }
    return {name: random_weights.drawn(name, torch.Size(shape)) for name, shape in shapes.items()}


def make(out: Path) -> Path:
    """Write config, weights and tokenizer of a draft into ``out`` and return it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(_config(), indent=1))
    save_file(_weights(), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, VOCAB)
    return out
