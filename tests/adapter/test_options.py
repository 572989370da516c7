"""Configuration is refused by name: option, value, what is allowed."""

from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

import sglang_ext_cpu
from sglang_ext import config
from sglang_ext.adapter import drafts, setup
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.options import (
    EARLY_REFUSALS,
    KV_TYPES,
    REFUSALS,
    refuse_model,
    refuse_unsupported,
)
from sglang_ext.adapter.page_copies import EngineCopies, page_copies
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.transfer.kernel_copies import KernelCopies

GOOD = {
    "speculative_algorithm": None,
    "pp_size": 1,
    "enable_dp_attention_local_control_broadcast": False,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "disaggregation_mode": "null",
    "enable_pd_role_switch": False,
    "hicache_storage_backend": None,
    "hicache_write_policy": "write_through",
    "hicache_host_memory_mode": "cache",
    "hicache_mem_layout": "page_first",
    "kv_cache_dtype": "fp8_e4m3",
    "radix_eviction_policy": "slru",
    "radix_eviction_policy_config": None,
    "enable_session_radix_cache": False,
    "enable_streaming_session": False,
    "enable_unified_memory": False,
    "enable_lmcache": False,
    "enable_flexkv": False,
    "enable_hisparse": False,
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
    "dllm_algorithm": None,
    "disable_hybrid_swa_memory": False,
    "enable_unified_cache_external_linker": False,
}


def test_supported_options_pass() -> None:
    refuse_unsupported(SimpleNamespace(**GOOD))
    refuse_unsupported(SimpleNamespace(**GOOD, kv_events_config='{"publisher": "zmq"}'))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.field)
def test_each_refusal_names_option_value_and_what_is_allowed(refusal) -> None:  # noqa: ANN001
    bad = 2 if isinstance(GOOD[refusal.field], int) else "other"
    bad = True if isinstance(GOOD[refusal.field], bool) else bad
    # some are refused beside others alone
    beside = {"pp_size": ("--pp-size" in refusal.allowed and 2) or 1}
    beside["enable_session_radix_cache"] = "--enable-session" in refusal.allowed
    options = {**GOOD, **beside, refusal.field: bad}
    with pytest.raises(StartupError) as caught:
        refuse_unsupported(SimpleNamespace(**options), (refusal,))
    message = str(caught.value)
    assert f"{refusal.option} {bad} " in message
    assert refusal.why in message
    assert f"; allowed: {refusal.allowed}; or use {refusal.instead}" in message


@pytest.mark.parametrize("algorithm", drafts.SERVED)
def test_drafts_whose_kv_has_a_place_are_served(algorithm: str) -> None:
    for name in (algorithm, algorithm.lower()):
        refuse_unsupported(SimpleNamespace(**{**GOOD, "speculative_algorithm": name}))


@pytest.mark.parametrize("algorithm", ["UNO", "MINE"])
def test_drafts_that_nobody_has_looked_at_are_refused_with_what_to_use(algorithm: str) -> None:
    refused = rf"--speculative-algorithm {algorithm} .* allowed: no value, EAGLE, .*NGRAM, DFLASH"
    with pytest.raises(StartupError, match=refused):
        refuse_unsupported(SimpleNamespace(**{**GOOD, "speculative_algorithm": algorithm}))


def test_every_algorithm_of_the_engine_is_known() -> None:
    """What a new one has KV of, and at which positions, has to be looked at first."""
    names = {algorithm.name for algorithm in SpeculativeAlgorithm}
    assert names == {*drafts.SERVED, "NONE", "UNO"} - {"NEXTN"}
    assert SpeculativeAlgorithm.from_string("NEXTN") is SpeculativeAlgorithm.EAGLE
    found = {
        algorithm.name: (drafts.have_kv(algorithm), drafts.overlap(algorithm))
        for algorithm in SpeculativeAlgorithm
    }
    expected = {"NONE": (False, 0), "NGRAM": (False, 0), "FROZEN_KV_MTP": (False, 1)}
    expected |= dict.fromkeys(("EAGLE", "EAGLE3", "STANDALONE"), (True, 1))
    assert {name: found[name] for name in expected} == expected
    assert found["DFLASH"] == found["DSPARK"] == (True, 0)


def test_drafts_of_deepseek_v4_alone_are_refused_elsewhere() -> None:
    drafts.refuse_elsewhere(SpeculativeAlgorithm.DFLASH)
    with pytest.raises(StartupError, match=r"DSPARK is not supported .*; DSPARK with DeepSeek-V4"):
        drafts.refuse_elsewhere(SpeculativeAlgorithm.DSPARK)


@pytest.mark.parametrize("kind", ["nvfp4", "fp4_mx_block16", "mxfp8"])
def test_kv_with_scales_of_blocks_is_refused_with_what_to_use(kind: str) -> None:
    refused = rf"--kv-cache-dtype {kind} .* allowed: auto, bf16, bfloat16, fp8_e4m3, fp8_e5m2"
    with pytest.raises(StartupError, match=refused):
        refuse_unsupported(SimpleNamespace(**{**GOOD, "kv_cache_dtype": kind}))


def test_a_policy_takes_its_own_parameters_alone() -> None:
    given = {"threshold": 4096, "next_prompt_estimate": 512}
    tlru = {**GOOD, "radix_eviction_policy": "tlru", "radix_eviction_policy_config": given}
    refuse_unsupported(SimpleNamespace(**tlru))
    for other in ({"radix_eviction_policy": "slru"}, {"radix_eviction_policy_config": {"x": 1}}):
        with pytest.raises(StartupError, match=r"--radix-eviction-policy-config .* no such param"):
            refuse_unsupported(SimpleNamespace(**{**tlru, **other}))


def test_a_prefill_server_passes_and_a_decode_server_does_not() -> None:
    for mode in ("null", "prefill"):
        refuse_unsupported(SimpleNamespace(disaggregation_mode=mode), EARLY_REFUSALS)
    with pytest.raises(StartupError, match=r"--disaggregation-mode decode .* null, prefill"):
        refuse_unsupported(SimpleNamespace(disaggregation_mode="decode"), EARLY_REFUSALS)


def test_every_type_of_kv_that_the_engine_offers_is_known() -> None:
    """One that is new is refused until somebody has looked where its scales are."""
    from sglang.srt.arg_groups.fields.model import Model

    offered = get_type_hints(Model, include_extras=True)["kv_cache_dtype"].__metadata__[0].choices
    assert {*KV_TYPES, "nvfp4", "fp4_mx_block16", "mxfp8"} == set(offered)


def test_the_toggle_selects_and_unknown_variables_are_refused() -> None:
    assert config.from_environment({config.TOGGLE: "1"}).selected
    assert not config.from_environment({}).selected
    with pytest.raises(StartupError, match="SGLANG_EXT_SWA_HICACHE='maybe' is not allowed"):
        config.from_environment({config.TOGGLE: "maybe"})
    with pytest.raises(StartupError, match="unknown environment variable SGLANG_EXT_TYPO"):
        config.from_environment({"SGLANG_EXT_TYPO": "1"})


@pytest.mark.parametrize(
    ("given", "disabled", "becomes"),
    [
        (None, False, (config.BACKEND, True)),
        (config.BACKEND, False, (config.BACKEND, True)),
        (None, True, (config.BACKEND, False)),
        ("other", False, ("other", False)),
        ("other", True, ("other", False)),
    ],
)
def test_the_toggle_switches_nothing_on_for_another_cache(
    given: str | None,
    disabled: bool,
    becomes: tuple[str, bool],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = SimpleNamespace(
        radix_cache_backend=given, disable_radix_cache=disabled, enable_hierarchical_cache=False
    )
    setup.select(options)
    assert (options.radix_cache_backend, options.enable_hierarchical_cache) == becomes
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == (given == "other")
    assert all("--radix-cache-backend other" in line for line in said)


SERVED = {
    # what the README names, as the engine's models are called
    "gpt-oss": ["GptOssForCausalLM"],
    "Gemma 4": [
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
    ],
    "Llama 4": ["Llama4ForConditionalGeneration"],
    "MiMo": ["MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"],
    "Mellum": ["MellumForCausalLM"],
    "Step-3.5": ["Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"],
}
WITHOUT_WINDOWS = ["MiMoForCausalLM", "Qwen3ForCausalLM"]


def test_models_are_what_they_are_named() -> None:
    from sglang.srt.configs.model_config import is_hybrid_swa_model
    from sglang.srt.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in [name for names in SERVED.values() for name in names]:
        assert architecture in known
        assert is_hybrid_swa_model([architecture])
        refuse_model(architecture)
    for architecture in WITHOUT_WINDOWS:
        assert architecture in known
        assert not is_hybrid_swa_model([architecture])
        refuse_model(architecture)


def test_what_the_engine_keeps_beside_kv_is_refused_by_its_name() -> None:
    from transformers import PretrainedConfig

    config = PretrainedConfig(architectures=["DeepseekV32ForCausalLM"], index_topk=2048)
    beside = setup.beside_kv(SimpleNamespace(hf_config=config))
    with pytest.raises(StartupError, match=r"not serve DeepseekV32ForCausalLM: .* index \(DSA\)"):
        refuse_model("DeepseekV32ForCausalLM", beside)


def test_text_only_llama_4_is_refused_whatever_its_configuration_says() -> None:
    """A configuration can ask for a pool of windows (``is_hybrid_swa``); chunks it cannot ask
    for."""
    from sglang.srt.configs.model_config import is_local_attention_model

    assert is_local_attention_model(["Llama4ForConditionalGeneration"])
    assert not is_local_attention_model(["Llama4ForCausalLM"])
    with pytest.raises(StartupError, match="use a checkpoint of Llama4ForConditionalGeneration"):
        refuse_model("Llama4ForCausalLM")


def test_the_checkpoint_interval_is_a_number_of_tokens() -> None:
    tokens = [
        config.from_environment({config.CHECKPOINT_TOKENS: text}).checkpoint_tokens
        for text in ("", "0", " 4096 ")
    ]
    assert tokens == [None, 0, 4096]
    for text in ("-1", "1.5", "none", "null", "\u0665"):
        with pytest.raises(StartupError, match=f"SGLANG_EXT_CHECKPOINT_TOKENS='{text}' is not"):
            config.from_environment({config.CHECKPOINT_TOKENS: text})


def test_who_copies_is_one_of_two() -> None:
    assert config.from_environment({}).copies is None
    for kind in ("engine", "kernels"):
        assert config.from_environment({config.COPIES: kind}).copies == kind
    with pytest.raises(StartupError, match=r"SGLANG_EXT_COPIES='gpu' is not allowed; use engine"):
        config.from_environment({config.COPIES: "gpu"})


def test_the_engine_copies_on_a_gpu_and_kernels_on_a_cpu() -> None:
    indices = SlotIndices(Geometry(16, 32))
    chosen = [
        type(page_copies(None, [None, None], indices, "kernel", torch.device(device)))
        for device in ("cpu", "cuda")
    ]
    assert chosen == [KernelCopies, EngineCopies]


def test_the_reference_platform_is_on_a_cpu_or_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv(sglang_ext_cpu.DEVICE, device)
        found.append(sglang_ext_cpu.on_gpu())
    assert found == [False, True]
    monkeypatch.setenv(sglang_ext_cpu.DEVICE, "gpu")
    with pytest.raises(SystemExit, match=r"EXT_CPU_DEVICE='gpu' is not allowed; use cpu or cuda"):
        sglang_ext_cpu.on_gpu()
