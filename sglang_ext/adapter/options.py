"""Which engine options the cache honours, and which it refuses by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_ext.adapter.drafts import SERVED
from sglang_ext.config import BACKEND, TOGGLE
from sglang_ext.core.eviction_policy import POLICIES
from sglang_ext.errors import StartupError
from sglang_ext.planning.launch_line import KV_TYPES

OWN_CACHE = f"SGLang's own cache: without --radix-cache-backend {BACKEND} and {TOGGLE}=1"
"""What serves what this cache does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """An engine option that is not supported (yet).

    Attributes:
        refused: whether a value is, with these options.
        allowed: what is.
        why: it is not supported.
        instead: what to use in its place.
    """

    option: str
    field: str
    refused: Callable[[Any, Any], bool]
    allowed: str
    why: str
    instead: str = OWN_CACHE

    def message(self, value: Any) -> str:
        """One line."""
        return (
            f"{self.option} {value} is not supported by --radix-cache-backend {BACKEND}: "
            f"{self.why}; allowed: {self.allowed}; or use {self.instead}"
        )


def _is_set(value: Any, _: Any) -> bool:
    return bool(value)


def _above_one(value: Any, _: Any) -> bool:
    return value is not None and value > 1


def _is_none_of(*allowed: str) -> Callable[[Any, Any], bool]:
    return lambda value, _: value not in allowed


_BY_PAGES = ("page_first", "page_first_direct", "page_head")
"""Host layouts in which a page is in one place. ``layer_first`` was replaced by then."""

PARAMETERS = {"tlru": ("threshold", "next_prompt_estimate")}
"""What eviction policies can be told."""


def _has_other_parameters(value: Any, options: Any) -> bool:
    return not set(value or ()) <= set(PARAMETERS.get(options.radix_eviction_policy, ()))


_NOT_RUN = "it has not been run with this cache"
_OTHER_TIERS = "another host tier would take the place of this one"
_STORAGE = "this cache's storage tier: --hicache-storage-backend"

REFUSALS = (
    Refusal(
        "--speculative-algorithm",
        "speculative_algorithm",
        lambda value, options: value is not None and value.upper() not in SERVED,
        f"no value, {', '.join(SERVED)}",
        "how others use slots is not known",
        OWN_CACHE,
    ),
    Refusal(
        "--hicache-storage-backend",
        "hicache_storage_backend",
        lambda value, options: bool(value) and options.pp_size > 1,
        "no value with --pp-size above 1",
        "a call that waits for storage might be done on one stage and refused on the next",
        "--tp-size",
    ),
    Refusal(
        "--disaggregation-mode",
        "disaggregation_mode",
        lambda value, options: value != "null" and options.pp_size > 1,
        "null with --pp-size above 1",
        _NOT_RUN,
        "--tp-size on prefill servers",
    ),
    Refusal(
        "--enable-dp-attention-local-control-broadcast",
        "enable_dp_attention_local_control_broadcast",
        _is_set,
        "off",
        "calls that need an idle server must reach all ranks in the same step",
        "DP attention without it",
    ),
    Refusal("--attn-cp-size", "attn_cp_size", _above_one, "1", _NOT_RUN, "--tp-size"),
    Refusal("--dcp-size", "dcp_size", _above_one, "1", _NOT_RUN, "--tp-size"),
    Refusal(
        "--enable-pd-role-switch",
        "enable_pd_role_switch",
        _is_set,
        "off",
        "a server that changes its role clears the storage of all servers",
        "servers that keep their roles",
    ),
    Refusal(
        "--hicache-host-memory-mode",
        "hicache_host_memory_mode",
        _is_none_of("cache"),
        "cache",
        "the host keeps pages, and is not a buffer in front of storage",
    ),
    Refusal(
        "--hicache-mem-layout",
        "hicache_mem_layout",
        _is_none_of(*_BY_PAGES),
        ", ".join(_BY_PAGES),
        "on the host a page is in one place",
    ),
    Refusal(
        "--kv-cache-dtype",
        "kv_cache_dtype",
        _is_none_of(*KV_TYPES),
        ", ".join(KV_TYPES),
        "scales of blocks would get to neither the host nor storage",
    ),
    Refusal(
        "--radix-eviction-policy",
        "radix_eviction_policy",
        _is_none_of(*POLICIES),
        ", ".join(POLICIES),
        "this cache has no such policy",
    ),
    Refusal(
        "--radix-eviction-policy-config",
        "radix_eviction_policy_config",
        _has_other_parameters,
        "no value; threshold and next_prompt_estimate with tlru",
        "the policy has no such parameter",
    ),
    Refusal(
        "--radix-eviction-policy",
        "radix_eviction_policy",
        lambda value, options: options.enable_session_radix_cache and value != "lru",
        "lru with --enable-session-radix-cache",
        "what open sessions have used goes last, and the rest by its last use",
    ),
    Refusal(
        "--enable-streaming-session",
        "enable_streaming_session",
        _is_set,
        "off",
        "such a session keeps KV that the table does not know",
        "sessions without it: a turn finds what the one before has left",
    ),
    Refusal(
        "--enable-unified-memory",
        "enable_unified_memory",
        _is_set,
        "off",
        "slots in it are virtual, and move",
    ),
    Refusal("--enable-lmcache", "enable_lmcache", _is_set, "off", _OTHER_TIERS, _STORAGE),
    Refusal("--enable-flexkv", "enable_flexkv", _is_set, "off", _OTHER_TIERS, _STORAGE),
    Refusal(
        "--enable-unified-cache-external-linker",
        "enable_unified_cache_external_linker",
        _is_set,
        "off",
        _OTHER_TIERS,
        _STORAGE,
    ),
    Refusal("--enable-hisparse", "enable_hisparse", _is_set, "off", _NOT_RUN),
    # batches that are cut in two, or run beside each other
    Refusal("--enable-two-batch-overlap", "enable_two_batch_overlap", _is_set, "off", _NOT_RUN),
    Refusal("--enable-pdmux", "enable_pdmux", _is_set, "off", _NOT_RUN),
    Refusal("--dllm-algorithm", "dllm_algorithm", _is_set, "no value", _NOT_RUN),
    Refusal(
        "--disable-hybrid-swa-memory",
        "disable_hybrid_swa_memory",
        _is_set,
        "off",
        "there would be no windows to keep apart",
    ),
)

EARLY_REFUSALS = (
    Refusal(
        "--disaggregation-mode",
        "disaggregation_mode",
        lambda value, _: value == "decode",
        "null, prefill",
        "the engine turns every prefix cache off on a decode server",
        f"the options of this cache on prefill servers alone; SGLang's own there, without "
        f"--radix-cache-backend {BACKEND} and {TOGGLE}=1, takes "
        "--disaggregation-decode-enable-radix-cache",
    ),
)
"""Of options with which the engine would serve without the cache, and say nothing."""


def refused(options: Any, refusals: tuple[Refusal, ...] = REFUSALS) -> list[str]:
    """Options with a value that the cache does not support: a line for each, which names the
    option, the value, why, what is allowed and what to use.

    Args:
        options: an object with the engine's option names as attributes: resolved, or for
            EARLY_REFUSALS as they were given.
    """
    values = ((refusal, getattr(options, refusal.field)) for refusal in refusals)
    return [refusal.message(value) for refusal, value in values if refusal.refused(value, options)]


def refuse_unsupported(options: Any, refusals: tuple[Refusal, ...] = REFUSALS) -> None:
    """Check the engine's options.

    Args:
        options, refusals: see ``refused``.

    Raises:
        StartupError: the first of those that are refused.
    """
    if problems := refused(options, refusals):
        raise StartupError(problems[0])


_WITHOUT_CHUNKS = {"Llama4ForCausalLM": "Llama4ForConditionalGeneration"}
"""Architectures for which the engine's attention leaves the chunks out, whatever the configuration
says of pools, and the one of the same model for which it does not."""


def refuse_model(architecture: str, beside: str | None = None) -> None:
    """Check the model, as far as its configuration says something.

    Args:
        architecture: as the model's configuration names it.
        beside: what the engine keeps of a prefix beside KV, None for nothing.

    Raises:
        StartupError: there is such a thing, or the engine does not compute with its windows; the
            message names the architecture and what to use.
    """
    if beside is not None:
        raise StartupError(
            f"--radix-cache-backend {BACKEND} does not serve {architecture}: SGLang keeps {beside} "
            f"beside its KV; use {OWN_CACHE}"
        )
    if served := _WITHOUT_CHUNKS.get(architecture):
        raise StartupError(
            f"--radix-cache-backend {BACKEND} does not serve {architecture}: SGLang keeps no pool "
            "of windows for it, and its attention reads beyond the chunks; use a checkpoint of "
            f"{served}, or {OWN_CACHE}"
        )
