"""A tiny Llama 4 in the form of a multimodal checkpoint: three layers of four read chunks.

Heads of K and V and their width are those of Maverick. There are fewer layers and heads of Q, no
experts, and everything else is narrow; a chunk is 128 tokens instead of 8192, so that short prompts
have several of them. The draft has the same heads.
"""

from pathlib import Path
from typing import Any

from launch.models import eagle3, random_weights
from launch.models.tiny import SPECIAL_TOKENS

LAYERS, HIDDEN, MLP, VOCAB = 4, 64, 128, 512
HEADS, KV_HEADS, HEAD_DIM, CHUNK = 8, 8, 128, 128
CONTEXT = 32768


def config() -> Any:
    """The Hugging Face configuration of text and images."""
    from transformers import Llama4Config

    text = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "intermediate_size_mlp": MLP,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "attention_chunk_size": CHUNK,
        # as for long prompts, which get there at 8192 tokens
        "floor_scale": CHUNK,
        # Maverick's; the engine computes the other form in bfloat16 wherever there is no CUDA
        "use_qk_norm": False,
        # no layer has experts, which the engine has no plain form of
        "moe_layers": [],
        "interleave_moe_layer_step": LAYERS + 1,
        "num_local_experts": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": CONTEXT,
        **SPECIAL_TOKENS,
        "dtype": "float32",
    }
    images = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 28,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    return Llama4Config(
        architectures=["Llama4ForConditionalGeneration"],
        text_config=text,
        vision_config=images,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
        dtype="float32",
    )


def make(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from transformers import Llama4ForConditionalGeneration

    return random_weights.save(Llama4ForConditionalGeneration(config()), out, VOCAB)


def make_draft(out: Path) -> Path:
    """Write a draft for the model that ``make`` writes into ``out`` and return it."""
    sizes = (HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT)
    return eagle3.make(eagle3.Target(*sizes, read=(0, 1, 2)), out)
