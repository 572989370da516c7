"""A tiny Gemma 4: five layers with a window to one without, which has fewer and wider heads; and
its assistant, which drafts.

Heads of K and V and their widths are those of Gemma 4 26B. There are fewer layers and heads of Q,
no experts, and everything else is narrow; the window is 128 tokens instead of 1024, so that short
prompts leave it.

The assistant has no K and V of its own: each of its layers reads those of the target's last layer
of its kind.
"""

from pathlib import Path
from typing import Any

from launch.models import random_weights
from launch.models.tiny import SPECIAL_TOKENS

LAYERS, HIDDEN, MLP, VOCAB, WINDOW = 6, 64, 128, 512, 128
HEADS, KV_HEADS, HEAD_DIM = 8, 8, 256
FULL_KV_HEADS, FULL_HEAD_DIM = 2, 512
ASSISTANT_HIDDEN = 32


def config() -> Any:
    """The Hugging Face configuration of text and images."""
    from transformers import Gemma4Config

    text = {
        **_attention(),
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0,
    }
    images = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "position_embedding_size": 64,
    }
    return Gemma4Config(
        architectures=["Gemma4ForConditionalGeneration"],
        text_config=text,
        vision_config=images,
        audio_config=None,
        # else the engine looks for the files that prepare images and sounds
        language_model_only=True,
        **SPECIAL_TOKENS,
        dtype="float32",
    )


def _attention() -> dict[str, Any]:
    """What target and assistant have in common."""
    return {
        "intermediate_size": MLP,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_global_key_value_heads": FULL_KV_HEADS,
        "global_head_dim": FULL_HEAD_DIM,
        # V of a layer without a window is its K before positions
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 32768,
        **SPECIAL_TOKENS,
        "dtype": "float32",
    }


def assistant_config() -> Any:
    """The Hugging Face configuration of the assistant: one layer of each kind."""
    from transformers import Gemma4AssistantConfig

    text = {
        **_attention(),
        "model_type": "gemma4_text",
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size": ASSISTANT_HIDDEN,
        "vocab_size_per_layer_input": 0,
    }
    return Gemma4AssistantConfig(
        architectures=["Gemma4AssistantForCausalLM"],
        text_config=text,
        backbone_hidden_size=HIDDEN,
        **SPECIAL_TOKENS,
        dtype="float32",
    )


def make(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` and return it."""
    from transformers import Gemma4ForConditionalGeneration

    # the model multiplies embeddings by the root of its width, and products of queries and keys
    # by one
    return random_weights.save(
        Gemma4ForConditionalGeneration(config()), out, VOCAB, embedding=HIDDEN**-0.5, norms=0.4
    )


def make_assistant(out: Path) -> Path:
    """Write the assistant of the model that ``make`` writes into ``out`` and return it."""
    from transformers import Gemma4AssistantForCausalLM

    return random_weights.save(
        Gemma4AssistantForCausalLM(assistant_config()), out, VOCAB, norms=0.4
    )
