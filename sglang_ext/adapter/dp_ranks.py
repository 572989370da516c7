"""Calls that a server does on all of its ranks or on none, where DP ranks do different things.

With DP attention each DP rank has its own requests, cache and transfers, and decides for itself
whether it is idle. Most of what the ranks agree on they agree on within a DP rank, in every
step. What is here crosses DP ranks, and needs what the engine does with calls of an operator:
they reach all ranks in the same step. A step has no other collective of ours that crosses them,
so a DP rank without requests holds up nobody.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.rank_agreement import RankAgreement

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        AttachHiCacheStorageReqInput,
        AttachHiCacheStorageReqOutput,
        DetachHiCacheStorageReqInput,
        DetachHiCacheStorageReqOutput,
        FlushCacheReqOutput,
    )
    from sglang.srt.managers.scheduler import Scheduler

_NOT_IDLE = "Reject {}: a rank of the scheduler is not idle."


def everywhere(done: bool) -> bool:
    """Whether something is done on all ranks of the server. A collective, for a call that
    reaches all of them in the same step."""
    from sglang.srt.runtime_context import get_parallel

    return bool(RankAgreement([get_parallel().tp_group.cpu_group]).minimum([int(done)])[0])


def attach(
    original: "Callable[..., AttachHiCacheStorageReqOutput]",
    scheduler: "Scheduler",
    request: "AttachHiCacheStorageReqInput",
) -> "AttachHiCacheStorageReqOutput":
    """Attach a storage on all DP ranks or on none; the engine decides on each for itself."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    if not everywhere(scheduler.is_fully_idle()):
        return AttachHiCacheStorageReqOutput(success=False, message=_NOT_IDLE.format("attach"))
    was_attached = scheduler.tree_cache.enable_storage
    answer = original(scheduler, request)
    if everywhere(answer.success) or not answer.success:
        return answer
    if not was_attached:
        _undo_attach(scheduler)
    return AttachHiCacheStorageReqOutput(
        success=False, message="it did not start on another DP rank"
    )


def _undo_attach(scheduler: "Scheduler") -> None:
    """As the engine's detach, which is a call of its own for all ranks."""
    from sglang.srt.runtime_context import get_context

    scheduler.tree_cache.detach_storage_backend()
    scheduler.enable_hicache_storage = False
    get_context().override(
        "scheduler.detach_hicache",
        hicache_storage_backend=None,
        hicache_storage_backend_extra_config=None,
    )


def detach(
    original: "Callable[..., DetachHiCacheStorageReqOutput]",
    scheduler: "Scheduler",
    request: "DetachHiCacheStorageReqInput",
) -> "DetachHiCacheStorageReqOutput":
    """Detach the storage if all DP ranks are idle; the engine decides on each for itself."""
    from sglang.srt.managers.io_struct import DetachHiCacheStorageReqOutput

    if not everywhere(scheduler.is_fully_idle()):
        return DetachHiCacheStorageReqOutput(success=False, message=_NOT_IDLE.format("detach"))
    return original(scheduler, request)


async def flush_all(tokenizer: Any, timeout_s: float | None = None) -> "FlushCacheReqOutput":
    """In the process that answers HTTP: a flush is done when all DP ranks have done it. The
    engine says what the first one to answer says."""
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    tokenizer.auto_create_handle_loop()
    answers = await tokenizer.flush_cache_communicator(FlushCacheReqInput(timeout_s=timeout_s))
    answer: FlushCacheReqOutput = min(answers, key=lambda answer: answer.success)
    if answer.success and tokenizer.mm_processor is not None:
        tokenizer.mm_processor.clear_preprocess_cache()
    return answer
