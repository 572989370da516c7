"""The answer to a call that clears the storage: the engine says that it is done, whatever
came of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter import dp_ranks, hooks

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import ClearHiCacheReqInput, ClearHiCacheReqOutput
    from sglang.srt.managers.scheduler import Scheduler

CLEAR = "sglang.srt.managers.scheduler.Scheduler.clear_hicache_storage_wrapped"


def install() -> None:
    """Hook a scheduler's call, before it keeps it; for a scheduler with our cache.

    Raises:
        StartupError: the hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookType

    hooks.apply((CLEAR, HookType.AROUND, clear))


def clear(
    _: Callable[..., Any], scheduler: "Scheduler", request: "ClearHiCacheReqInput"
) -> "ClearHiCacheReqOutput":
    """Clear the storage, and say whether every rank has."""
    from sglang.srt.managers.io_struct import ClearHiCacheReqOutput

    # the engine passes on what the first DP rank says
    done = dp_ranks.everywhere(scheduler.tree_cache.clear_storage_backend())
    return ClearHiCacheReqOutput(success=done)
