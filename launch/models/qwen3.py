"""A tiny Qwen3: full attention in every layer, so there is nothing but pages of it.

python -m launch.models.qwen3 --out DIR
"""

from pathlib import Path
from typing import Any

from launch.models import random_weights
from launch.models.tiny import SPECIAL_TOKENS
from sglang_ext.arguments import Parser, output_folder

VOCAB = 512


def config() -> Any:
    """Four layers, and two heads of KV."""
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32768,
        **SPECIAL_TOKENS,
        dtype="float32",
    )


def make(out: Path) -> Path:
    """Config, weights and tokenizer in a directory."""
    from transformers import Qwen3ForCausalLM

    return random_weights.save(Qwen3ForCausalLM(config()), out, VOCAB)


if __name__ == "__main__":
    parser = Parser(description="A tiny Qwen3.")
    parser.add_argument("--out", type=output_folder, required=True, help="directory to write")
    print(make(parser.parse_args().out))
