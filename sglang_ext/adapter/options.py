"""Which engine options the cache honours, and which it refuses by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_ext.config import BACKEND, TOGGLE
from sglang_ext.core.eviction_policy import POLICIES
from sglang_ext.errors import StartupError
from sglang_ext.planning.launch_line import KV_TYPES


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """An engine option that is not supported (yet)."""

    option: str
    field: str
    refused: Callable[[Any], bool]
    allowed: str


def _is_set(value: Any) -> bool:
    return bool(value)


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


_BY_PAGES = ("page_first", "page_first_direct", "page_head")
"""Host layouts in which a page is in one place. ``layer_first`` was replaced by then."""

REFUSALS = (
    Refusal("--speculative-algorithm", "speculative_algorithm", _is_set, "no value"),
    Refusal("--pp-size", "pp_size", _above_one, "1"),
    # calls that need an idle server must reach all ranks in the same step
    Refusal(
        "--enable-dp-attention-local-control-broadcast",
        "enable_dp_attention_local_control_broadcast",
        _is_set,
        "off",
    ),
    Refusal("--attn-cp-size", "attn_cp_size", _above_one, "1"),
    Refusal("--dcp-size", "dcp_size", _above_one, "1"),
    Refusal("--disaggregation-mode", "disaggregation_mode", lambda v: v != "null", "null"),
    Refusal(
        "--hicache-host-memory-mode", "hicache_host_memory_mode", lambda v: v != "cache", "cache"
    ),
    Refusal(
        "--hicache-mem-layout",
        "hicache_mem_layout",
        lambda v: v not in _BY_PAGES,
        ", ".join(_BY_PAGES),
    ),
    Refusal("--kv-cache-dtype", "kv_cache_dtype", lambda v: v not in KV_TYPES, ", ".join(KV_TYPES)),
    Refusal(
        "--radix-eviction-policy",
        "radix_eviction_policy",
        lambda v: v not in POLICIES,
        ", ".join(POLICIES),
    ),
    Refusal("--radix-eviction-policy-config", "radix_eviction_policy_config", _is_set, "no value"),
    Refusal("--enable-session-radix-cache", "enable_session_radix_cache", _is_set, "off"),
    Refusal("--enable-streaming-session", "enable_streaming_session", _is_set, "off"),
    Refusal("--enable-unified-memory", "enable_unified_memory", _is_set, "off"),
    Refusal("--enable-lmcache", "enable_lmcache", _is_set, "off"),
    Refusal("--enable-flexkv", "enable_flexkv", _is_set, "off"),
    Refusal("--enable-hisparse", "enable_hisparse", _is_set, "off"),
    # batches that are cut in two, or run beside each other: not run yet
    Refusal("--enable-two-batch-overlap", "enable_two_batch_overlap", _is_set, "off"),
    Refusal("--enable-pdmux", "enable_pdmux", _is_set, "off"),
    Refusal("--dllm-algorithm", "dllm_algorithm", _is_set, "no value"),
    Refusal("--disable-hybrid-swa-memory", "disable_hybrid_swa_memory", _is_set, "off"),
    Refusal(
        "--enable-unified-cache-external-linker",
        "enable_unified_cache_external_linker",
        _is_set,
        "off",
    ),
)


def refused(options: Any) -> list[str]:
    """Options with a value that the cache does not support: a line for each, which names option,
    value and what is allowed.

    Args:
        options: an object with the engine's option names as attributes.
    """
    values = ((refusal, getattr(options, refusal.field)) for refusal in REFUSALS)
    return [
        f"{refusal.option} {value} is not supported by "
        f"--radix-cache-backend {BACKEND}; allowed: {refusal.allowed}"
        for refusal, value in values
        if refusal.refused(value)
    ]


def refuse_unsupported(options: Any) -> None:
    """Check the engine's resolved options.

    Args:
        options: see ``refused``.

    Raises:
        StartupError: the first of those that are refused.
    """
    if problems := refused(options):
        raise StartupError(problems[0])


_USE_INSTEAD = {
    "Llama4ForCausalLM": "the multimodal checkpoint (Llama4ForConditionalGeneration), or ",
}
"""What serves the same model."""


def refuse_model(architecture: str, *, hybrid: bool) -> None:
    """Check the model, as far as its configuration says something.

    Args:
        architecture: as the model's configuration names it.
        hybrid: whether the engine keeps its sliding-window KV in a pool apart.

    Raises:
        StartupError: it does not; the message names the architecture and what to use.
    """
    if not hybrid:
        raise StartupError(
            f"--radix-cache-backend {BACKEND} does not serve {architecture}: SGLang keeps no pool "
            "of sliding-window KV for this architecture, so there are no windows to keep apart; "
            f"use {_USE_INSTEAD.get(architecture, '')}SGLang's own cache: without "
            f"--radix-cache-backend {BACKEND} and {TOGGLE}=1"
        )
