"""Drafts of the EAGLE3 kind: a layer that reads hidden states of three of the target's layers.

As in NVIDIA's for gpt-oss-120b and for Llama 4 Maverick, embedding and head are the target's, and
attention is like the target's without windows or chunks.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launch.models import random_weights
from launch.models.tiny import SPECIAL_TOKENS, write_tokenizer


class Target(NamedTuple):
    """The model that a draft is for.

    Attributes:
        hidden: width of a token between its layers.
        mlp: width inside the draft's MLP.
        heads: of Q.
        kv_heads: of K and V.
        head_dim: width of a head.
        vocabulary: tokens.
        context: the longest prompt.
        read: numbers of the layers whose hidden states the draft reads.
    """

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    read: tuple[int, ...]


def _config(target: Target) -> dict[str, Any]:
    """What is in ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": target.hidden,
        "intermediate_size": target.mlp,
        "vocab_size": target.vocabulary,
        # none of its own
        "draft_vocab_size": None,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "target_hidden_size": target.hidden,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": target.read,
            "use_aux_hidden_state": True,
        },
        "max_position_embeddings": target.context,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
        "torch_dtype": "float32",
    }


def _weights(target: Target) -> dict[str, torch.Tensor]:
    """By name, as in a checkpoint."""
    hidden, mlp = target.hidden, target.mlp
    # the embedded token and the hidden state, side by side
    inputs = 2 * hidden
    q, kv = target.heads * target.head_dim, target.kv_heads * target.head_dim
    shapes = {
        "fc.weight": (hidden, len(target.read) * hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (q, inputs),
        "midlayer.self_attn.k_proj.weight": (kv, inputs),
        "midlayer.self_attn.v_proj.weight": (kv, inputs),
        "midlayer.self_attn.o_proj.weight": (hidden, q),
        "midlayer.mlp.gate_proj.weight": (mlp, hidden),
        "midlayer.mlp.up_proj.weight": (mlp, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, mlp),
        "norm.weight": (hidden,),
    }
    return {name: random_weights.drawn(name, torch.Size(shape)) for name, shape in shapes.items()}


def make(target: Target, out: Path) -> Path:
    """Write config, weights and tokenizer of a draft into ``out`` and return it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(_config(target), indent=1))
    save_file(_weights(target), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, target.vocabulary)
    return out
