"""A model's shape from its ``config.json``, as the engine reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_ext.planning.compressed import CompressedShape
from sglang_ext.planning.draft import DraftShape
from sglang_ext.planning.latent import LatentShape
from sglang_ext.planning.launch_line import LaunchLine
from sglang_ext.planning.model import ModelShape, Shape

_LATENT = "Dots3NoteForCausalLM"
_READ_BEFORE = ("GptOssForCausalLM", "MellumForCausalLM", "Gemma4", _LATENT)
"""Architectures whose window counts the position itself; the engine takes the number of the others
for positions before it."""
_FP8 = ("fp8_e4m3", "fp8_e5m2")
_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "half": 2}


class ModelConfigError(Exception):
    """A configuration is not there, or is not one of a model that is served; one line."""


def find(name: str) -> Path:
    """The ``config.json`` of a model: a file, a folder, or a hub's id that is in the cache.

    Raises:
        ModelConfigError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/")):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            pass
        else:
            cached = try_to_load_from_cache(name, "config.json")
            if isinstance(cached, str):
                return Path(cached)
    raise ModelConfigError(
        f"{name!r} has no config.json here; use a file, a folder, or a model that was downloaded"
    )


def load(path: Path) -> dict[str, Any]:
    """What is in a file.

    Raises:
        ModelConfigError: nothing that describes a model.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelConfigError(f"{path} names no architecture")
    return config


def architecture(config: Mapping[str, Any]) -> str:
    """The engine's class for the model."""
    return str(config["architectures"][0])


def shape_of(config: Mapping[str, Any], dtype: str = "auto", kv_cache_dtype: str = "auto") -> Shape:
    """All heads of a model.

    Args:
        dtype, kv_cache_dtype: the engine's options.

    Raises:
        ModelConfigError: the configuration is of another kind of model.
    """
    text = {**config, **config.get("text_config", {})}
    try:
        if architecture(config) == "DeepseekV4ForCausalLM":
            return _compressed(text)
        if architecture(config) == _LATENT:
            return _latent(text, _element_bytes(config, text, dtype, kv_cache_dtype))
        full, swa = _layers(architecture(config), text)
        heads = _gemma4_heads(text) if _is_gemma4(text) else _heads(text)
        return ModelShape(
            full_layers=full,
            swa_layers=swa,
            window=_window(architecture(config), text),
            dtype_bytes=_element_bytes(config, text, dtype, kv_cache_dtype),
            **heads,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelConfigError(
            f"{architecture(config)} is not a model with full and sliding-window attention that "
            f"can be planned: {error!r}"
        ) from None


def draft_of(line: LaunchLine) -> DraftShape | None:
    """The draft that a line names; None without one, and where its KV cannot be counted: drafts of
    other algorithms, or with a window.

    Raises:
        ModelConfigError: there is no configuration of a model.
    """
    if line.draft_model is None or str(line.speculative).upper() != "EAGLE3":
        return None
    config = load(find(line.draft_model))
    try:
        layers = int(config["num_hidden_layers"])
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            return None
        heads = _heads(config)
        kv_type = line.draft_kv_cache_dtype or line.kv_cache_dtype
        return DraftShape(
            layers=layers,
            kv_heads=heads["kv_heads"],
            k_width=heads["head_dim"],
            v_width=heads["v_head_dim"],
            dtype_bytes=_element_bytes(config, config, line.dtype, kv_type),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelConfigError(
            f"{architecture(config)} is not a draft that can be planned: {error!r}"
        ) from None


def _compressed(text: Mapping[str, Any]) -> CompressedShape:
    ratios = text["compress_ratios"][: int(text["num_hidden_layers"])]
    if others := set(ratios) - {0, 4, 128}:
        raise ValueError(f"compress_ratios {sorted(others)}: V4.1 cannot be planned yet")
    return CompressedShape(
        c4_layers=ratios.count(4),
        c128_layers=ratios.count(128),
        other_layers=ratios.count(0),
        # the engine takes the number for positions before the one that reads
        window=int(text["sliding_window"]) + 1,
        index_dim=int(text.get("index_head_dim", 128)),
    )


def _latent(text: Mapping[str, Any], dtype_bytes: int) -> LatentShape:
    if text.get("index_topk"):
        raise ValueError("index_topk: an index of full attention (DSA) is not served")
    full, swa = _layers(_LATENT, text)
    return LatentShape(
        full_layers=full,
        swa_layers=swa,
        window=_window(_LATENT, text),
        row=int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"]),
        swa_row=int(text["swa_kv_lora_rank"]) + int(text["swa_qk_rope_head_dim"]),
        dtype_bytes=dtype_bytes,
    )


def _layers(name: str, text: Mapping[str, Any]) -> tuple[int, int]:
    """(full-attention layers, layers with a window)."""
    count = int(text["num_hidden_layers"])
    if name == "Llama4ForConditionalGeneration":
        return count // 4, count - count // 4
    if pattern := text.get("hybrid_layer_pattern"):
        swa = sum(1 for layer in pattern[:count] if layer == 1)
        return count - swa, swa
    kinds = text["layer_types"][:count]
    return kinds.count("full_attention"), kinds.count("sliding_attention")


def _window(name: str, text: Mapping[str, Any]) -> int:
    for key in ("sliding_window_size", "sliding_window", "attention_chunk_size"):
        if (size := text.get(key)) is not None:
            return int(size) + (not name.startswith(_READ_BEFORE))
    raise KeyError("sliding_window")


def _is_gemma4(text: Mapping[str, Any]) -> bool:
    return str(text.get("model_type", "")).startswith("gemma4")


def _gemma4_heads(text: Mapping[str, Any]) -> dict[str, int]:
    """Windows first: full-attention layers have numbers of their own, by layer or for all."""
    kinds = text["layer_types"]
    heads, width = int(text["num_key_value_heads"]), int(text["head_dim"])
    own = {"head_dim": text.get("global_head_dim", 512)}
    if text.get("attention_k_eq_v", True):
        own["num_key_value_heads"] = text.get("num_global_key_value_heads")
    if (by_layer := text.get("per_layer_config")) is not None:
        own = by_layer.get(str(kinds.index("full_attention")), {})
    return {
        "kv_heads": int(own.get("num_key_value_heads") or heads),
        "head_dim": int(own.get("head_dim") or width),
        "swa_kv_heads": heads,
        "swa_head_dim": width,
    }


def _heads(text: Mapping[str, Any]) -> dict[str, int]:
    heads = int(text.get("num_key_value_heads") or text.get("num_attention_groups") or 0)
    heads = heads or int(text["num_attention_heads"])
    width = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    swa_width = int(text.get("swa_head_dim") or width)
    own = text.get("attention_other_setting") or {}
    return {
        "kv_heads": heads,
        "head_dim": width,
        "v_head_dim": int(text.get("v_head_dim") or width),
        "swa_kv_heads": int(
            text.get("swa_num_key_value_heads") or own.get("num_attention_groups") or heads
        ),
        "swa_head_dim": swa_width,
        "swa_v_head_dim": int(text.get("swa_v_head_dim") or swa_width),
    }


def element_bytes_of(kv_cache_dtype: str) -> int | None:
    """Bytes of one element of KV by the engine's option; None where the model decides."""
    if kv_cache_dtype in _FP8:
        return 1
    return None if kv_cache_dtype == "auto" else _BYTES[kv_cache_dtype]


def _element_bytes(
    config: Mapping[str, Any], text: Mapping[str, Any], dtype: str, kv_cache_dtype: str
) -> int:
    if size := element_bytes_of(kv_cache_dtype):
        return size
    quantization = config.get("quantization_config") or {}
    quantization = quantization.get("quantization", quantization)
    if str(quantization.get("kv_cache_quant_algo")).upper() == "FP8":
        return 1
    if dtype == "auto":
        dtype = str(text.get("dtype") or text.get("torch_dtype") or "float32")
        return min(2, _BYTES[dtype])  # the engine does not take float32 unless told to
    return _BYTES[dtype]
