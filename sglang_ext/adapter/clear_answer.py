"""The answer to a call that clears the storage: the engine says that it is done, whatever
came of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import ClearHiCacheReqInput, ClearHiCacheReqOutput
    from sglang.srt.managers.scheduler import Scheduler

CLEAR = "sglang.srt.managers.scheduler.Scheduler.clear_hicache_storage_wrapped"


def install() -> None:
    """Hook a scheduler's call, before it keeps it; for a scheduler with our cache.

    Raises:
        StartupError: the hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if any(known is clear for _, known, _ in HookRegistry._hooks[CLEAR]):
        return
    HookRegistry.register(CLEAR, clear, HookType.AROUND)
    HookRegistry.apply_hooks()
    if CLEAR not in HookRegistry._patched:
        raise StartupError(f"the hook on {CLEAR} did not take effect; see the log above")


def clear(
    _: Callable[..., Any], scheduler: "Scheduler", request: "ClearHiCacheReqInput"
) -> "ClearHiCacheReqOutput":
    """Clear the storage, and say whether every rank has."""
    from sglang.srt.managers.io_struct import ClearHiCacheReqOutput

    return ClearHiCacheReqOutput(success=scheduler.tree_cache.clear_storage_backend())
