"""Make a tiny model of the Step-3.5 architecture: random weights, dense layers.

The engine gives this architecture no sliding-window memory when its host tier is on; ours does.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from launch.models.tiny import write_tokenizer

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4, 64, 4, 2, 16, 128, 512
CONTEXT = 32768


def config(window: int) -> dict[str, Any]:
    """What is in ``config.json``; every second layer has full attention."""
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(LAYERS)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_attention_groups": KV_HEADS,
        "attention_other_setting": {
            "num_attention_heads": HEADS,
            "num_attention_groups": KV_HEADS,
        },
        "num_hidden_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_seq_len": CONTEXT,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": [10000.0] * LAYERS,
        "partial_rotary_factors": [1.0] * LAYERS,
        "swiglu_limits": [0.0] * LAYERS,
        "swiglu_limits_shared": [0.0] * LAYERS,
        "use_head_wise_attn_gate": False,
        "layer_types": kinds,
        "sliding_window": window,
        # no layer has experts
        "moe_layers_enum": str(LAYERS + 1),
        "moe_num_experts": 2,
        "moe_top_k": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """By name; activations stay of order one, queries and keys are sharpened."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, std: float | None = None) -> torch.Tensor:
        scale = 1 / math.sqrt(columns) if std is None else std
        return torch.randn(rows, columns, generator=generator) * scale

    found = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 1.0),
        "model.norm.weight": torch.zeros(HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": torch.zeros(HIDDEN),
            f"{name}.post_attention_layernorm.weight": torch.zeros(HIDDEN),
            f"{name}.self_attn.q_norm.weight": torch.ones(HEAD_DIM),
            f"{name}.self_attn.k_norm.weight": torch.ones(HEAD_DIM),
            f"{name}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            f"{name}.mlp.up_proj.weight": matrix(MLP, HIDDEN),
            f"{name}.mlp.down_proj.weight": matrix(HIDDEN, MLP),
        }
    return found


def make(out: Path, window: int) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(window), indent=1))
    save_file(weights(), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, VOCAB)
    return out
