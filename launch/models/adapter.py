"""Make a LoRA adapter with random weights for a tiny model.

python -m launch.models.adapter --model DIR --out DIR --seed 1
"""

import json
from pathlib import Path

import torch

from sglang_ext.arguments import Parser, input_folder, output_folder

RANK = 4


def make_adapter(model: Path, out: Path, seed: int = 1) -> Path:
    """Write an adapter of all attention projections of a model into ``out`` and return it.

    It changes the outputs as much as the weights themselves do.
    """
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads, dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    hidden = config["hidden_size"]
    shapes = {
        "q_proj": (hidden, heads * dim),
        "k_proj": (hidden, kv_heads * dim),
        "v_proj": (hidden, kv_heads * dim),
        "o_proj": (heads * dim, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                drawn = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                weights[f"{prefix}.{part}.weight"] = drawn
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shapes),
        "base_model_name_or_path": str(model),
    }
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return out


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=input_folder, required=True, help="directory of the model")
    parser.add_argument("--out", type=output_folder, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(make_adapter(args.model, args.out, args.seed))


if __name__ == "__main__":
    main()
