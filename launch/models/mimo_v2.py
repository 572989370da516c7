"""A tiny MiMo-V2: K wider than V, more heads and sinks in its windows, and layers that draft.

Heads of K and V, their widths, the window, the order of the layers and the three that draft are
those of MiMo-V2-Flash; there are fewer layers and heads of Q, no experts, and everything else is
narrow.
"""

import json
from pathlib import Path
from typing import Any

import torch

from launch.models.random_weights import drawn
from launch.models.tiny import SPECIAL_TOKENS, write_tokenizer

HIDDEN, MLP, VOCAB = 64, 128, 512
HEADS, K_WIDTH, V_WIDTH, WINDOW = 8, 192, 128, 128
KV_HEADS = {"full": 4, "window": 8}
WINDOWS = [0, 1, 1, 1, 1, 0]
"""1 where a layer has a window: the first layer has none, nor has every sixth."""
DRAFTS = 3
"""Layers of which each drafts one more token; all have a window."""


def config() -> dict[str, Any]:
    """What is in ``config.json``."""
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "num_hidden_layers": len(WINDOWS),
        "hybrid_layer_pattern": WINDOWS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS["full"],
        "head_dim": K_WIDTH,
        "v_head_dim": V_WIDTH,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": KV_HEADS["window"],
        "swa_head_dim": K_WIDTH,
        "swa_v_head_dim": V_WIDTH,
        "sliding_window": WINDOW,
        "sliding_window_size": WINDOW,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707,
        "attention_bias": False,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000.0,
        "swa_rope_theta": 10000.0,
        # one for all layers, so that it is not taken for a scaling of positions
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "partial_rotary_factor": 0.334,
        },
        # no layer has experts
        "moe_layer_freq": [0] * len(WINDOWS),
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "hidden_act": "silu",
        "layernorm_epsilon": 1e-5,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
        "torch_dtype": "float32",
    }


def weights() -> dict[str, torch.Tensor]:
    """By name, as in a checkpoint."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer, window in enumerate(WINDOWS):
        name = f"model.layers.{layer}"
        shapes |= _layer(name, window=bool(window))
        shapes[f"{name}.post_attention_layernorm.weight"] = (HIDDEN,)
    for draft in range(DRAFTS):
        name = f"model.mtp.layers.{draft}"
        shapes |= _layer(name, window=True)
        shapes |= {
            f"{name}.pre_mlp_layernorm.weight": (HIDDEN,),
            # of the embedded token and of the hidden state behind it, side by side
            f"{name}.enorm.weight": (HIDDEN,),
            f"{name}.hnorm.weight": (HIDDEN,),
            f"{name}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
            f"{name}.final_layernorm.weight": (HIDDEN,),
        }
    return {name: drawn(name, torch.Size(shape)) for name, shape in shapes.items()}


def _layer(name: str, *, window: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer by name."""
    kv_heads = KV_HEADS["window" if window else "full"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.input_layernorm.weight": (HIDDEN,),
        f"{name}.self_attn.q_proj.weight": (HEADS * K_WIDTH, HIDDEN),
        f"{name}.self_attn.k_proj.weight": (kv_heads * K_WIDTH, HIDDEN),
        f"{name}.self_attn.v_proj.weight": (kv_heads * V_WIDTH, HIDDEN),
        f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * V_WIDTH),
        f"{name}.mlp.gate_proj.weight": (MLP, HIDDEN),
        f"{name}.mlp.up_proj.weight": (MLP, HIDDEN),
        f"{name}.mlp.down_proj.weight": (HIDDEN, MLP),
    }
    if window:
        shapes[f"{name}.self_attn.attention_sink_bias"] = (HEADS,)
    return shapes


def make(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(), indent=1))
    save_file(weights(), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, VOCAB)
    return out
