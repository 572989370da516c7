"""The engine asks a cache that it has built to take the drafts' pools in, and knows one class that
can. Ours has them from the start."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter import hooks
from sglang_ext.adapter.prefix_cache import SwaHiCache

if TYPE_CHECKING:
    from sglang.srt.speculative.base_spec_worker import HiCacheDraftPlan

REGISTER = "sglang.srt.mem_cache.kv_cache_builder.maybe_register_hicache_draft"


def install() -> None:
    """Hook the engine's function, before it is called; for a scheduler with our cache.

    Raises:
        StartupError: the hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookType

    hooks.apply((REGISTER, HookType.AROUND, register))


def register(
    original: Callable[..., Any], *, tree_cache: Any, draft_plan: "HiCacheDraftPlan"
) -> None:
    """Leave a cache of ours as it is; any other one gets what the engine gives it."""
    if not isinstance(tree_cache, SwaHiCache):
        original(tree_cache=tree_cache, draft_plan=draft_plan)
