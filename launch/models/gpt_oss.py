"""A tiny gpt-oss: experts, sinks, and a window of 128 tokens in every second layer; and a draft.

Heads, their width and the window are those of the released models; there are fewer layers and
experts, and everything else is narrow. The draft is an EAGLE3 one: a layer of another
architecture, which reads hidden states of three of the target's layers. As in NVIDIA's for
gpt-oss-120b, embedding and head are the target's.
"""

import json
from pathlib import Path
from typing import Any

import torch

from launch.models import random_weights
from launch.models.tiny import SPECIAL_TOKENS, write_tokenizer

LAYERS, HIDDEN, MLP, VOCAB = 4, 64, 64, 512
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 8, 64, 128
CONTEXT = 131072
READ_BY_DRAFT = [1, 2, 3]
"""Layers of the target."""


def config() -> Any:
    """The Hugging Face configuration; the even layers have the window."""
    from transformers import GptOssConfig

    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        **SPECIAL_TOKENS,
        dtype="float32",
    )


def make(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from transformers import GptOssForCausalLM

    return random_weights.save(GptOssForCausalLM(config()), out, VOCAB)


def draft_config() -> dict[str, Any]:
    """What is in the draft's ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        # none of its own
        "draft_vocab_size": None,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "target_hidden_size": HIDDEN,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": READ_BY_DRAFT,
            "use_aux_hidden_state": True,
        },
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
        "torch_dtype": "float32",
    }


def draft_weights() -> dict[str, torch.Tensor]:
    """By name, as in a checkpoint."""
    # the embedded token and the hidden state, side by side
    inputs = 2 * HIDDEN
    shapes = {
        "fc.weight": (HIDDEN, len(READ_BY_DRAFT) * HIDDEN),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "midlayer.post_attention_layernorm.weight": (HIDDEN,),
        "midlayer.self_attn.q_proj.weight": (HEADS * HEAD_DIM, inputs),
        "midlayer.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, inputs),
        "midlayer.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, inputs),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": (MLP, HIDDEN),
        "midlayer.mlp.up_proj.weight": (MLP, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, MLP),
        "norm.weight": (HIDDEN,),
    }
    return {name: random_weights.drawn(name, torch.Size(shape)) for name, shape in shapes.items()}


def make_draft(out: Path) -> Path:
    """Write a draft for the model that ``make`` writes into ``out`` and return it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(draft_config(), indent=1))
    save_file(draft_weights(), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, VOCAB)
    return out
