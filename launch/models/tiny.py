"""Make a small hybrid sliding-window model: random weights, real architecture.

The architecture is Mellum (Qwen3-MoE family, sliding and full attention layers
mixed) with dense MLPs. Weights are float32 safetensors with an init that keeps
activations of order one, so greedy outputs vary with the whole prefix; SGLang's
``--load-format dummy`` would not do, its outputs depend on the last token only
and hide a corrupted cache.

    python -m launch.models.tiny --out DIR --size tiny --window 128
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from launch.models.kept import kept
from sglang_ext.arguments import Parser, output_folder, whole


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of one preset."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
"""Nothing ends an answer: a random model must not stop by chance."""
SIZES = {
    # Starts in seconds: for tests.
    "tiny": Shape(4, 64, 4, 2, 16, 128, 512),
    # 64 bytes of KV for a token in each of two layers: for hosts of very many pages.
    "narrow": Shape(2, 64, 4, 1, 8, 128, 512),
    # A prefill of 2k tokens takes seconds on two cores: for benchmarks.
    "small": Shape(8, 512, 8, 4, 64, 1536, 2048),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; every width of the preset can be overridden."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_folder, required=True, help="directory to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--window", type=whole(2), default=128, help="sliding window, tokens")
    parser.add_argument(
        "--full-every",
        type=whole(1),
        default=2,
        help="every n-th layer has full attention, the others a sliding window",
    )
    parser.add_argument("--context", type=whole(1), default=32768, help="positions, tokens")
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=whole(1), default=None)
    return parser.parse_args(argv)


def build_config(shape: Shape, window: int, full_every: int, context: int):  # noqa: ANN201
    """The Hugging Face configuration of the model."""
    from transformers import MellumConfig

    layer_types = [
        "full_attention" if i % full_every == full_every - 1 else "sliding_attention"
        for i in range(shape.layers)
    ]
    return MellumConfig(
        architectures=["MellumForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=context,
        sliding_window=window,
        layer_types=layer_types,
        mlp_layer_types=["dense"] * shape.layers,
        **SPECIAL_TOKENS,
        dtype="float32",
    )


def init_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter in place: normal with variance 1 / fan-in, norms at one.

    Attention is sharpened (query and key twice as large) so that a token depends
    on few positions rather than on the mean of all of them; then a wrong page
    changes the output.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(2.0 if "q_norm" in name or "k_norm" in name else 1.0)
                continue
            std = 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(parameter.shape[-1])
            parameter.normal_(0.0, std, generator=generator)


def write_tokenizer(out: Path, vocab: int) -> None:
    """A word-level tokenizer: token i is the word ``t<i>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", bos_token="t1"
    )
    fast.save_pretrained(out)


def make_model(args: argparse.Namespace) -> Path:
    """Write config, weights and tokenizer into ``args.out`` and return it."""
    from transformers import MellumForCausalLM

    overrides = {
        field.name: value
        for field in dataclasses.fields(Shape)
        if (value := getattr(args, field.name)) is not None
    }
    shape = dataclasses.replace(SIZES[args.size], **overrides)
    config = build_config(shape, args.window, args.full_every, args.context)
    model = MellumForCausalLM(config).to(torch.float32)
    init_weights(model, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out, safe_serialization=True)
    write_tokenizer(args.out, shape.vocab)
    return args.out


def ready_made(window: int, full_every: int = 2) -> Path:
    """A tiny model with this window and every so manieth layer with full attention, made unless
    it is there; kept between runs."""
    name = f"tiny-{window}" if full_every == 2 else f"tiny-{window}-{full_every}"
    out = Path(__file__).resolve().parents[2] / ".models" / name
    options = ["--window", str(window), "--full-every", str(full_every)]
    return kept(out, lambda place: make_model(parse_args(["--out", str(place), *options])))


if __name__ == "__main__":
    print(make_model(parse_args()))
