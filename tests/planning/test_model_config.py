"""Shapes of models from their configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.models import gemma4, gpt_oss, llama4, mimo_v2, step
from sglang_ext.planning.draft import DraftShape
from sglang_ext.planning.latent import LatentShape
from sglang_ext.planning.launch_line import parse
from sglang_ext.planning.model import COMPRESSED, PRESETS, ModelShape
from sglang_ext.planning.model_config import ModelConfigError, draft_of, find, load, shape_of
from tests.planning import models

MIMO = mimo_v2.config()


def saved(config: Any, folder: Path) -> dict[str, Any]:
    """As a checkpoint has it."""
    config.save_pretrained(folder)
    return load(find(str(folder)))


def test_gpt_oss(tmp_path: Path) -> None:
    shape = shape_of(saved(gpt_oss.config(), tmp_path))
    assert (shape.full_layers, shape.swa_layers, shape.window) == (2, 2, 128)
    # K and V, layers, heads, width, bytes: float32 is not what the engine takes by itself
    assert shape.full_token_bytes == shape.swa_token_bytes == 2 * 2 * 8 * 64 * 2


def test_gemma_4_has_other_heads_in_windows(tmp_path: Path) -> None:
    shape = shape_of(saved(gemma4.config(), tmp_path), dtype="float32")
    assert (shape.full_layers, shape.swa_layers, shape.window) == (1, 5, 128)
    assert shape.full_widths == (2 * 512 * 4, 2 * 512 * 4)
    assert shape.swa_widths == (5 * 8 * 256 * 4, 5 * 8 * 256 * 4)


def test_gemma_4_as_it_was_released() -> None:
    """The heads of full attention are named for all layers, and none by layer."""
    text = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 60,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "num_global_key_value_heads": 4,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "dtype": "bfloat16",
    }
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}
    shape = shape_of({**config, "text_config": text})
    assert shape == PRESETS["gemma-4-31b"]
    without = {**text, "attention_k_eq_v": False}
    assert shape_of({**config, "text_config": without}).kv_heads == 16


def test_llama_4_reads_chunks(tmp_path: Path) -> None:
    shape = shape_of(saved(llama4.config(), tmp_path))
    assert (shape.full_layers, shape.swa_layers, shape.window) == (1, 3, 129)
    assert shape.full_widths == (8 * 128 * 2, 8 * 128 * 2)


def test_mimo_v2_has_k_wider_than_v() -> None:
    shape = shape_of(MIMO, dtype="float32")
    assert (shape.full_layers, shape.swa_layers, shape.window) == (2, 4, 129)
    assert shape.full_widths == (2 * 4 * 192 * 4, 2 * 4 * 128 * 4)
    assert shape.swa_widths == (4 * 8 * 192 * 4, 4 * 8 * 128 * 4)


def test_step_names_heads_in_its_own_way() -> None:
    config = step.config(100, step.LAYERS, 0)
    shape = shape_of(config)
    assert shape.full_layers + shape.swa_layers == config["num_hidden_layers"]
    assert shape.kv_heads == config["num_attention_groups"]
    assert shape.swa_kv_heads == config["attention_other_setting"]["num_attention_groups"]


def test_the_type_of_kv() -> None:
    assert shape_of(MIMO).dtype_bytes == 2
    assert shape_of(MIMO, dtype="float32").dtype_bytes == 4
    assert shape_of(MIMO, "float32", "bf16").dtype_bytes == 2
    assert shape_of(MIMO, "float32", "fp8_e4m3").dtype_bytes == 1
    quantized = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    assert shape_of({**MIMO, "quantization_config": quantized}).dtype_bytes == 1


def test_heads_of_a_rank() -> None:
    """Four heads on eight ranks: two ranks have the same one, as in the engine."""
    whole = PRESETS["mimo-v2-flash"]
    assert whole.on(1).full_widths == whole.full_widths
    assert whole.on(4).full_token_bytes * 4 == whole.full_token_bytes
    eighth = whole.on(8)
    assert (eighth.kv_heads, eighth.swa_kv_heads) == (1, 1)
    same = ModelShape(1, 1, window=2, kv_heads=4, head_dim=8)
    assert same.on(2).swa_token_bytes * 2 == same.swa_token_bytes


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "names no architecture"),
        ([], "names no architecture"),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}, "LlamaForCausalLM"),
        ({**MIMO, "hybrid_layer_pattern": [0] * 6}, "swa_layers"),
        ({**MIMO, "sliding_window": None, "sliding_window_size": None}, "sliding_window"),
    ],
)
def test_what_is_no_such_model_is_named(config: Any, named: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelConfigError, match=named):
        shape_of(load(find(str(file))))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/has-this", "/no/such/file"):
        with pytest.raises(ModelConfigError, match=r"has no config\.json"):
            find(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="cannot be read"):
        load(find(str(tmp_path)))


def test_a_model_in_the_cache_of_the_hub_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(MIMO))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert shape_of(load(find("org/name"))) == shape_of(MIMO)


V4_FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "sliding_window": 128,
    "index_head_dim": 128,
}
"""The last ratio is of the layer that drafts."""


def test_deepseek_v4_has_layers_by_ratio() -> None:
    shape = shape_of(V4_FLASH)
    assert shape == COMPRESSED["deepseek-v4-flash"]
    assert shape.on(8) == shape, "every rank has all of it"
    assert shape.geometry(1) == shape.geometry(256)
    # 64 tokens of KV and of the index, 2 tokens of KV; KV is padded to multiples of 576 bytes
    assert shape.full_token_bytes * 256 == 21 * (37_440 + 64 * 132) + 20 * 1728
    assert shape.swa_token_bytes * 256 == 43 * 149_760 + 21 * 8 * 4 * (512 + 128) * 4


def test_deepseek_v4_pro_has_no_layer_of_windows_alone() -> None:
    ratios = [128, 128, *([4, 128] * 29), 4, 0]
    shape = shape_of({**V4_FLASH, "num_hidden_layers": 61, "compress_ratios": ratios})
    assert shape == COMPRESSED["deepseek-v4-pro"]


DOTS3: dict[str, Any] = {
    "architectures": ["Dots3NoteForCausalLM"],
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "sliding_window_size": 512,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "swa_kv_lora_rank": 256,
    "swa_qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


def test_latent_rows_have_two_widths_and_no_heads() -> None:
    shape = shape_of(DOTS3)
    assert shape == LatentShape(2, 3, window=512, row=576, swa_row=320)
    assert shape.on(8) == shape, "every rank has all of it"
    assert shape_of(DOTS3, kv_cache_dtype="fp8_e4m3").full_token_bytes == 2 * 576
    assert shape.geometry(64).window == 511
    assert "2 full-attention layers of 1.15 kB and 3" in shape.said_of_layers()
    with pytest.raises(ModelConfigError, match=r"index_topk: an index .* \(DSA\) is not served"):
        shape_of({**DOTS3, "index_topk": 2048})
    with pytest.raises(ValueError, match="swa_layers must be at least 1"):
        LatentShape(2, 0, 512, 576, 320)


def test_other_ratios_are_no_model_to_plan() -> None:
    with pytest.raises(ModelConfigError, match=r"compress_ratios \[1, 2\]: V4.1 cannot be planned"):
        shape_of({**V4_FLASH, "compress_ratios": [1, 2] * 22})


def draft(folder: Path, words: str, **changes: Any) -> DraftShape | None:
    """What a line says of a draft."""
    path = models.saved(folder, {**models.EAGLE3, **changes})
    return draft_of(parse([*words.split(), "--speculative-draft-model-path", str(path)], "test"))


def test_a_draft_by_its_own_configuration(tmp_path: Path) -> None:
    eagle3 = "--speculative-algorithm EAGLE3"
    assert draft(tmp_path, eagle3) == DraftShape(1, 8, 64, 64, 2)
    assert draft(tmp_path, eagle3.replace("EAGLE3", "eagle3")) == draft(tmp_path, eagle3)
    fp8 = f"{eagle3} --kv-cache-dtype fp8_e4m3"
    assert draft(tmp_path, fp8) == DraftShape(1, 8, 64, 64, 1)
    assert draft(tmp_path, f"{fp8} --speculative-draft-kv-cache-dtype bf16") == draft(
        tmp_path, eagle3
    )
    assert draft(tmp_path, f"{eagle3} --dtype float32") == DraftShape(1, 8, 64, 64, 4)
    with pytest.raises(ModelConfigError, match="LlamaForCausalLMEagle3 is not a draft"):
        draft(tmp_path, eagle3, num_hidden_layers="few")


def test_drafts_that_are_not_counted(tmp_path: Path) -> None:
    assert draft(tmp_path, "") is None
    assert draft(tmp_path, "--speculative-algorithm NEXTN") is None
    windows = ["sliding_attention"]
    assert draft(tmp_path, "--speculative-algorithm EAGLE3", layer_types=windows) is None
    assert draft_of(parse(["--speculative-algorithm", "EAGLE3"], "test")) is None
