"""Calls of the engine that need an idle server, and a server that is paused.

The engine counts what the cache copies, reads and writes as work: as long as there is any, it
refuses such a call or fails an assertion. In a pause it asks the cache for nothing, so nothing
would ever end. These hooks let such a call wait for what is in flight, for a bounded time, and
keep the cache going in a pause. Every rank gets the same calls in the same step, so every rank
enters the same collectives. DP ranks need not be idle at the same time: see ``dp_ranks``.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter import cache_control, cache_routes, dp_ranks, hooks
from sglang_ext.adapter.rank_agreement import RankAgreement

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        AttachHiCacheStorageReqInput,
        AttachHiCacheStorageReqOutput,
        DetachHiCacheStorageReqInput,
        DetachHiCacheStorageReqOutput,
        DumperControlReqInput,
        ReleaseMemoryOccupationReqInput,
        ResumeMemoryOccupationReqInput,
    )
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    from sglang_ext.adapter.prefix_cache import SwaHiCache

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_TOKENIZER = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."

_COUNTS_EXPERTS = tuple(f"{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))

_SECONDS_UNTIL_IDLE = 10.0
"""So long a release of memory waits for requests to end."""
_REFUSAL = (
    f"memory was not released: the server was not idle within {_SECONDS_UNTIL_IDLE:.0f} s; "
    "pause generation (retract or abort) first"
)


@dataclasses.dataclass(frozen=True)
class WaitingRelease:
    """A release of memory that waits until the server is idle."""

    request: "ReleaseMemoryOccupationReqInput"
    deadline: float
    attempt: Callable[[], Any]
    agreement: RankAgreement


def install() -> None:
    """Hook a scheduler's calls, before it keeps any of them; for a scheduler with our cache.

    Raises:
        StartupError: a hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookType

    hooks.apply(
        (_SCHEDULER + "is_fully_idle", HookType.AROUND, is_fully_idle),
        (_SCHEDULER + "_record_scheduler_state_for_paused_engine", HookType.BEFORE, paused_step),
        (_SCHEDULER + "flush_cache", HookType.BEFORE, before_flush),
        (_SCHEDULER + "attach_hicache_storage_wrapped", HookType.AROUND, attach),
        (_SCHEDULER + "detach_hicache_storage_wrapped", HookType.AROUND, detach),
        (_SCHEDULER + "handle_dumper_control", HookType.AROUND, control),
        (_SCHEDULER + "process_input_requests", HookType.AFTER, after_requests),
        (_UPDATER + "flush_cache_after_weight_update", HookType.BEFORE, before_new_weights),
        (_UPDATER + "release_memory_occupation", HookType.AROUND, release_memory),
        (_UPDATER + "resume_memory_occupation", HookType.AROUND, resume_memory),
    )


def install_in_front() -> None:
    """Hook what the process that answers HTTP does.

    Raises:
        StartupError: a hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookType

    hooks.apply(
        (_TOKENIZER + "release_memory_occupation", HookType.REPLACE, release_or_raise),
        (_TOKENIZER + "flush_cache", HookType.REPLACE, dp_ranks.flush_all),
        (_TOKENIZER + "init_communicators", HookType.AFTER, cache_routes.add_routes),
        *((_TOKENIZER + name, HookType.AROUND, count_experts) for name in _COUNTS_EXPERTS),
    )


def _settle(scheduler: "Scheduler", *, give_up: bool) -> None:
    """Let transfers end if nothing else runs: what needs an idle server fails anyway if
    something does."""
    if scheduler.is_fully_idle(for_health_check=True, ignore_waiting=scheduler._engine_paused):
        _cache(scheduler).settle(give_up=give_up)


def _cache(scheduler: "Scheduler") -> "SwaHiCache":
    from sglang_ext.adapter.prefix_cache import SwaHiCache

    cache = scheduler.tree_cache
    assert isinstance(cache, SwaHiCache)
    return cache


# ---- a pause -----------------------------------------------------------------


def is_fully_idle(
    original: Callable[..., bool],
    scheduler: "Scheduler",
    for_health_check: bool = False,
    ignore_waiting: bool = False,
) -> bool:
    """In a pause requests wait, without KV, until somebody ends it: a flush, an attach or a
    detach need not wait for them."""
    if scheduler._engine_paused and not for_health_check:
        ignore_waiting = True
    return original(scheduler, for_health_check, ignore_waiting)


def paused_step(scheduler: "Scheduler") -> None:
    """The cache's part of a scheduler step, once in every turn of the paused loop."""
    scheduler._process_hicache_events(should_retry_storage_prefetch=False)


# ---- flush, attach, detach, new weights ---------------------------------------


def before_flush(scheduler: "Scheduler", *_: Any, **__: Any) -> None:
    """Storage gets what it was promised; if that takes too long the flush is refused."""
    _settle(scheduler, give_up=False)


def attach(
    original: "Callable[..., AttachHiCacheStorageReqOutput]",
    scheduler: "Scheduler",
    request: "AttachHiCacheStorageReqInput",
) -> "AttachHiCacheStorageReqOutput":
    """As before a flush."""
    _settle(scheduler, give_up=False)
    return dp_ranks.attach(original, scheduler, request)


def detach(
    original: "Callable[..., DetachHiCacheStorageReqOutput]",
    scheduler: "Scheduler",
    request: "DetachHiCacheStorageReqInput",
) -> "DetachHiCacheStorageReqOutput":
    """A storage that takes too long is not waited for."""
    _settle(scheduler, give_up=True)
    return dp_ranks.detach(original, scheduler, request)


def before_new_weights(updater: "SchedulerWeightUpdaterManager", *_: Any) -> None:
    """The weights have changed: what they have computed must go, written or not."""
    assert updater.scheduler is not None
    _settle(updater.scheduler, give_up=True)


# ---- the cache itself ---------------------------------------------------------


def control(
    original: Callable[..., Any], scheduler: "Scheduler", request: "DumperControlReqInput"
) -> Any:
    """Calls on the cache come under a name that the engine's dumper does not have."""
    if request.method != cache_control.METHOD:
        return original(scheduler, request)
    return _cache(scheduler).control.begin(request)


# ---- memory ------------------------------------------------------------------


def release_memory(
    original: Callable[..., Any],
    updater: "SchedulerWeightUpdaterManager",
    request: "ReleaseMemoryOccupationReqInput",
) -> Any:
    """Wait for an idle server where the engine would assert that it is. What is released
    already is left alone. None: the answer comes later."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    scheduler = updater.scheduler
    assert scheduler is not None

    agreement = RankAgreement([updater.tp_cpu_group])

    def attempt() -> Any:
        _settle(scheduler, give_up=True)
        # one DP rank may be idle while another is not, and the engine waits for all in its part
        (idle,) = agreement.minimum([int(scheduler.is_fully_idle())])
        return original(updater, request) if idle else None

    wanted = request.tags or GPU_MEMORY_ALL_TYPES
    request.tags = [tag for tag in wanted if tag not in updater.offload_tags]
    if not request.tags:
        return ReleaseMemoryOccupationReqOutput()
    deadline = time.monotonic() + _SECONDS_UNTIL_IDLE
    answer = attempt()
    if answer is None:
        _cache(scheduler).waiting_release = WaitingRelease(request, deadline, attempt, agreement)
    return answer


def after_requests(_: None, scheduler: "Scheduler", *__: Any) -> None:
    """Once a step: calls on the cache go on; try a release again that waits, or refuse it."""
    cache = _cache(scheduler)
    for answer, request in cache.control.look():
        scheduler.send_control_output(answer, request)
    if (waiting := cache.waiting_release) is None:
        return

    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    if waiting.agreement.minimum([int(time.monotonic() < waiting.deadline)])[0]:
        answer = waiting.attempt()
        if answer is None:
            return
    else:
        # the engine's answer has no field for a refusal
        answer = ReleaseMemoryOccupationReqOutput(rid=_REFUSAL)
    cache.waiting_release = None
    scheduler.send_control_output(answer, waiting.request)


def resume_memory(
    original: Callable[..., Any],
    updater: "SchedulerWeightUpdaterManager",
    request: "ResumeMemoryOccupationReqInput",
) -> Any:
    """What was not released needs no resume; the engine would fail on it."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    wanted = request.tags or GPU_MEMORY_ALL_TYPES
    request.tags = [tag for tag in wanted if tag in updater.offload_tags]
    return original(updater, request) if request.tags else ResumeMemoryOccupationReqOutput()


async def release_or_raise(
    tokenizer: Any, obj: "ReleaseMemoryOccupationReqInput", request: Any = None
) -> None:
    """In the process that answers HTTP: as the engine's, but a refusal reaches the caller.

    Raises:
        RuntimeError: memory was not released.
    """
    tokenizer.auto_create_handle_loop()
    answers = await tokenizer.release_memory_occupation_communicator(obj)
    if refusals := [answer.rid for answer in answers if answer.rid]:
        raise RuntimeError(refusals[0])


async def count_experts(original: Callable[..., Any], tokenizer: Any) -> None:
    """In the process that answers HTTP: a scheduler that does not count experts dies of this.

    Raises:
        HTTPException: this one does not.
    """
    from fastapi import HTTPException
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.expert_distribution_recorder_mode is None:
        raise HTTPException(400, "start with --expert-distribution-recorder-mode to count experts")
    await original(tokenizer)
