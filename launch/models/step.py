"""Make a tiny model of the Step-3.5 architecture: random weights, dense layers, layers that draft.

The engine gives this architecture no sliding-window memory when its host tier is on; ours does.

Of four layers the first has full attention, as in the released model. Its 45 layers matter to those
that draft: the engine takes layer 45 for each of them.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from launch.models.tiny import write_tokenizer

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4, 64, 4, 2, 16, 128, 512
CONTEXT = 32768
RELEASED_LAYERS, RELEASED_DRAFTS = 45, 3


def config(window: int, layers: int, drafts: int) -> dict[str, Any]:
    """What is in ``config.json``; lists of layers go on to those that draft."""
    windows = [_has_window(n, layers) for n in range(layers + drafts)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_attention_groups": KV_HEADS,
        "attention_other_setting": {
            # the released model has more of them here, in a configuration class of its own
            "num_attention_heads": HEADS,
            "num_attention_groups": KV_HEADS,
        },
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": drafts,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_seq_len": CONTEXT,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": [10000.0 if window else 5000000.0 for window in windows],
        "partial_rotary_factors": [1.0 if window else 0.5 for window in windows],
        "swiglu_limits": [0.0] * len(windows),
        "swiglu_limits_shared": [0.0] * len(windows),
        "use_head_wise_attn_gate": True,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": window,
        # no layer has experts
        "moe_layers_enum": str(len(windows)),
        "moe_num_experts": 2,
        "moe_top_k": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _has_window(layer: int, layers: int) -> bool:
    """Whether a layer reads a window; those behind the model's own draft."""
    return layer >= layers or layer % 4 > 0


def weights(layers: int, drafts: int, seed: int = 0) -> dict[str, torch.Tensor]:
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
    for layer in range(layers + drafts):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": torch.zeros(HIDDEN),
            f"{name}.post_attention_layernorm.weight": torch.zeros(HIDDEN),
            f"{name}.self_attn.q_norm.weight": torch.ones(HEAD_DIM),
            f"{name}.self_attn.k_norm.weight": torch.ones(HEAD_DIM),
            f"{name}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{name}.self_attn.g_proj.weight": matrix(HEADS, HIDDEN),
            f"{name}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            f"{name}.mlp.up_proj.weight": matrix(MLP, HIDDEN),
            f"{name}.mlp.down_proj.weight": matrix(HIDDEN, MLP),
        }
    for layer in range(layers, layers + drafts):
        name = f"model.layers.{layer}"
        found |= {
            # of the embedded token and of the hidden state behind it, side by side
            f"{name}.enorm.weight": torch.zeros(HIDDEN),
            f"{name}.hnorm.weight": torch.zeros(HIDDEN),
            f"{name}.eh_proj.weight": matrix(HIDDEN, 2 * HIDDEN),
            f"{name}.transformer.shared_head.norm.weight": torch.zeros(HIDDEN),
            f"{name}.transformer.shared_head.output.weight": matrix(VOCAB, HIDDEN),
        }
    return found


def make(out: Path, window: int, layers: int = LAYERS, drafts: int = 0) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it.

    Args:
        drafts: layers of which each drafts one more token; the engine wants 45 others with them.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(window, layers, drafts), indent=1))
    save_file(weights(layers, drafts), out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(out, VOCAB)
    return out


def make_with_drafts(out: Path) -> Path:
    """With as many layers as the released model, and a window of 128 tokens."""
    return make(out, 128, RELEASED_LAYERS, RELEASED_DRAFTS)
