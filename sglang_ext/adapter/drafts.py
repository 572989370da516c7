"""What speculative decoding asks of the cache.

A draft may have KV of its own. The engine gives it the target's slots: what is a page of the target
is a page of the draft, in pools of the draft. So drafts are more layers of a component, and their
KV goes wherever the page goes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ext.adapter import checkpoint
from sglang_ext.adapter.served_weights import is_elsewhere
from sglang_ext.config import BACKEND
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from sglang_ext.adapter.stacks import Stack

SERVED = ("EAGLE", "EAGLE3", "NEXTN", "FROZEN_KV_MTP", "STANDALONE", "NGRAM", "DFLASH", "DSPARK")
"""Algorithms by the engine's names; DSPARK with DeepSeek-V4 alone."""


def refuse_elsewhere(algorithm: Any) -> None:
    """Check the algorithm of a model that is not DeepSeek-V4.

    Raises:
        StartupError: its drafts are known there alone.
    """
    if algorithm.is_dspark():
        raise StartupError(
            f"--speculative-algorithm DSPARK is not supported by --radix-cache-backend {BACKEND} "
            f"for this model; allowed: no value, {', '.join(SERVED[:-1])}; DSPARK with DeepSeek-V4"
        )


def overlap(algorithm: Any) -> int:
    """Tokens behind a position that its KV is of as well: such a draft reads each position together
    with the token after it. The engine knows that of all but STANDALONE, whose KV is of another
    request's next token after a hit in its own cache."""
    return int(algorithm.is_eagle() or algorithm.is_standalone())


def have_kv(algorithm: Any) -> bool:
    """Whether drafts of an algorithm have KV of their own: some come from the text, or read the
    target's KV."""
    return not (algorithm.is_none() or algorithm.is_ngram() or algorithm.is_frozen_kv_mtp())


OPTIONS = (
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
)
"""Those of the engine that change what drafts have KV of."""


def checkpoints(algorithm: Any) -> list[Path | None]:
    """Those that drafts with KV were loaded from, if they are not in the target's; None for one
    that is not on this machine."""
    from sglang.srt.runtime_context import get_context, get_model

    if not have_kv(algorithm):
        return []
    option, model = get_context().config_leaf, get_model()
    path = option("speculative_draft_model_path")
    if path in (None, model.model_path):
        return []
    load_format = option("speculative_draft_load_format") or model.load_format
    if is_elsewhere(load_format, model.weight_cache_mode):
        return [None]
    revision = option("speculative_draft_model_revision")
    return [checkpoint.find(path, revision, model.download_dir)]


def described(stacks: Sequence["Stack"], geometry: Geometry) -> dict[str, Any]:
    """What of the drafts decides on the bytes of a page; JSON. Nothing without any."""
    found: dict[str, Any] = {}
    if geometry.overlap:
        found["overlap"] = geometry.overlap
    with_kv = [stack for stack in stacks if stack.has_drafts]
    if with_kv:
        found["drafts"] = {
            **settings_of_drafts(),
            "layers": [(stack.component, stack.layers, stack.kind) for stack in with_kv],
            "page_bytes": [stack.page_bytes(geometry) for stack in with_kv],
        }
    return found


def settings_of_drafts() -> dict[str, Any]:
    """What the engine's options say of KV of drafts; JSON."""
    from sglang.srt.runtime_context import get_context

    option = get_context().config_leaf
    return {
        "algorithm": str(option("speculative_algorithm")),
        "options": {name: str(option(name)) for name in OPTIONS},
    }


class DraftLayers(NamedTuple):
    """Layers of a draft.

    Attributes:
        pool: of the device.
        component: whose slots have the same numbers.
        is_packed: the engine reckons with them in the target's host pool.
    """

    pool: Any
    component: int
    is_packed: bool


def layers(params: "CacheInitParams") -> list[DraftLayers]:
    """Those of all drafts, without those that have none.

    Raises:
        StartupError: a pool is of a kind that is not supported.
    """
    packed, apart = params.mtp_draft_device_pools, params.sidecar_draft_device_pools
    found = [layer for pool in packed for layer in _of_pool(pool, is_packed=True)]
    found += [layer for pool in apart for layer in _of_pool(pool, is_packed=False)]
    return [layer for layer in found if layer.pool.layer_num]


def _of_pool(pool: Any, *, is_packed: bool) -> Iterator[DraftLayers]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    parts = [DraftLayers(pool, FULL, is_packed=False)]
    if type(pool) is SWAKVPool:
        component = FULL if pool.swa_uses_full_indices else WINDOW
        parts = [
            DraftLayers(pool.full_kv_pool, FULL, is_packed=False),
            DraftLayers(pool.swa_kv_pool, component, is_packed and component == WINDOW),
        ]
    for part in parts:
        if not isinstance(part.pool, MHATokenToKVPool):
            raise StartupError(
                f"{BACKEND}: drafts with a KV pool of type {type(part.pool).__name__} are not "
                "supported; allowed: MHA"
            )
        yield part
