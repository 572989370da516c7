"""A tiny gpt-oss: experts, sinks, and a window of 128 tokens in every second layer.

Heads, their width and the window are those of the released models; there are fewer layers and
experts, and everything else is narrow.
"""

from pathlib import Path
from typing import Any

from launch.models import random_weights
from launch.models.tiny import write_tokenizer

LAYERS, HIDDEN, MLP, VOCAB = 4, 64, 64, 512
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 8, 64, 128


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
        max_position_embeddings=131072,
        bos_token_id=1,
        # None: a random model must not stop by chance
        eos_token_id=None,
        pad_token_id=0,
        dtype="float32",
    )


def make(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM(config()).float()
    random_weights.fill(model)
    model.save_pretrained(out)
    write_tokenizer(out, VOCAB)
    return out
