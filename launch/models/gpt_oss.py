"""A tiny gpt-oss: experts, sinks, and a window of 128 tokens in every second layer; and a draft.

Heads, their width and the window are those of the released models; there are fewer layers and
experts, and everything else is narrow.
"""

from pathlib import Path
from typing import Any

from launch.models import eagle3, random_weights
from launch.models.tiny import SPECIAL_TOKENS

LAYERS, HIDDEN, MLP, VOCAB = 4, 64, 64, 512
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 8, 64, 128
CONTEXT = 131072


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


def make_draft(out: Path) -> Path:
    """Write a draft for the model that ``make`` writes into ``out`` and return it."""
    sizes = (HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT)
    return eagle3.make(eagle3.Target(*sizes, read=(1, 2, 3)), out)
