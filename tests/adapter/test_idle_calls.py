"""Calls that need an idle server: when they are made, when they wait, when they are refused."""

import types
from typing import Any

import pytest
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    ResumeMemoryOccupationReqOutput,
)

from sglang_ext.adapter import dp_ranks, idle_calls
from sglang_ext.adapter.cache_control import CacheControl


class Scheduler:
    """Requests that run or wait, transfers that end when somebody waits for them."""

    def __init__(self) -> None:
        self._engine_paused = False
        self.running, self.waiting, self.transfers = 0, 0, 0
        self.settled: list[bool] = []
        self.steps = 0
        self.answers: list[Any] = []
        self.waiting_release: Any = None
        self.control = CacheControl(self)  # type: ignore[arg-type]

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        return idle_calls.is_fully_idle(
            Scheduler.engine_is_idle,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            for_health_check,
            ignore_waiting,
        )

    def engine_is_idle(self, for_health_check: bool, ignore_waiting: bool) -> bool:
        waiting = 0 if ignore_waiting else self.waiting
        transfers = 0 if for_health_check else self.transfers
        return self.running + waiting + transfers == 0

    def settle(self, *, give_up: bool) -> None:
        self.settled.append(give_up)
        self.transfers = 0

    def send_control_output(self, answer: Any, request: Any) -> None:
        self.answers.append((answer, request))

    def _process_hicache_events(self, *, should_retry_storage_prefetch: bool) -> None:
        self.steps += not should_retry_storage_prefetch


class Updater:
    """The engine's part: it asserts that the server is idle."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.tp_cpu_group = None
        self.offload_tags: set[str] = set()

    def release(self, request: Any) -> Any:
        assert self.scheduler.is_fully_idle(ignore_waiting=self.scheduler._engine_paused)
        self.offload_tags |= set(request.tags)
        return ReleaseMemoryOccupationReqOutput()

    def resume(self, request: Any) -> Any:
        for tag in request.tags:
            self.offload_tags.remove(tag)
        return ResumeMemoryOccupationReqOutput()


class Rig:
    """One scheduler, and a clock in seconds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(idle_calls, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(idle_calls, "_cache", lambda scheduler: scheduler)
        self.scheduler = Scheduler()
        self.updater = Updater(self.scheduler)

    def release(self, *tags: str) -> Any:
        request = ReleaseMemoryOccupationReqInput(tags=list(tags) or None)
        return idle_calls.release_memory(Updater.release, self.updater, request)  # type: ignore[arg-type]

    def resume(self, *tags: str) -> Any:
        request = ResumeMemoryOccupationReqInput(tags=list(tags) or None)
        return idle_calls.resume_memory(Updater.resume, self.updater, request)  # type: ignore[arg-type]

    def step(self, seconds: float = 0.1) -> None:
        self.now += seconds
        idle_calls.after_requests(None, self.scheduler, [])  # type: ignore[arg-type]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_memory_is_released_when_transfers_have_ended(rig: Rig) -> None:
    rig.scheduler.transfers = 2
    assert rig.release() is not None
    assert rig.scheduler.settled == [True]
    assert GPU_MEMORY_TYPE_KV_CACHE in rig.updater.offload_tags


def test_memory_is_released_when_requests_have_ended(rig: Rig) -> None:
    """The engine counts the batch of the last answer as work for one more step."""
    rig.scheduler.running = 1
    assert rig.release() is None
    rig.step()
    assert not rig.scheduler.answers
    assert not rig.scheduler.settled, "it waits for transfers while requests run"
    rig.scheduler.running = 0
    rig.step()
    (answer, request), *more = rig.scheduler.answers
    assert answer.rid is None
    assert isinstance(request, ReleaseMemoryOccupationReqInput)
    assert not more
    assert rig.updater.offload_tags
    rig.step()
    assert len(rig.scheduler.answers) == 1


def test_a_release_that_waits_too_long_is_refused(rig: Rig) -> None:
    rig.scheduler.running = 1
    assert rig.release() is None
    rig.step(9.0)
    assert not rig.scheduler.answers
    rig.step(2.0)
    ((answer, _),) = rig.scheduler.answers
    assert "memory was not released" in answer.rid
    assert not rig.updater.offload_tags
    rig.scheduler.running = 0
    rig.step()
    assert len(rig.scheduler.answers) == 1, "it was refused, and is made all the same"


def test_what_is_released_is_not_released_again_and_nothing_else_is_resumed(rig: Rig) -> None:
    assert isinstance(rig.resume(), ResumeMemoryOccupationReqOutput)
    rig.release(GPU_MEMORY_TYPE_KV_CACHE)
    rig.scheduler.running = 1
    assert isinstance(rig.release(GPU_MEMORY_TYPE_KV_CACHE), ReleaseMemoryOccupationReqOutput)
    rig.scheduler.running = 0
    rig.release()
    assert rig.updater.offload_tags > {GPU_MEMORY_TYPE_WEIGHTS, GPU_MEMORY_TYPE_KV_CACHE}
    rig.resume(GPU_MEMORY_TYPE_WEIGHTS)
    rig.resume()
    rig.resume()
    assert not rig.updater.offload_tags


def test_what_waits_in_a_pause_is_no_work(rig: Rig) -> None:
    rig.scheduler.waiting = 3
    assert not rig.scheduler.is_fully_idle()
    rig.scheduler._engine_paused = True
    assert rig.scheduler.is_fully_idle()
    assert not rig.scheduler.is_fully_idle(for_health_check=True)
    rig.scheduler.running = 1
    assert not rig.scheduler.is_fully_idle()


def test_the_cache_takes_a_step_in_every_turn_of_a_pause(rig: Rig) -> None:
    idle_calls.paused_step(rig.scheduler)  # type: ignore[arg-type]
    assert rig.scheduler.steps == 1


def done(*_: Any) -> Any:
    """What the engine answers."""
    return types.SimpleNamespace(success=True)


def test_only_what_must_go_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_ranks, "everywhere", bool)
    scheduler: Any = rig.scheduler
    scheduler.tree_cache = types.SimpleNamespace(enable_storage=False)
    idle_calls.before_flush(scheduler, empty_cache=False)
    idle_calls.attach(done, scheduler, None)  # type: ignore[arg-type]
    assert rig.scheduler.settled == [False, False]
    idle_calls.detach(done, scheduler, None)  # type: ignore[arg-type]
    idle_calls.before_new_weights(rig.updater, None, True, "")  # type: ignore[arg-type]
    assert rig.scheduler.settled == [False, False, True, True]
    rig.scheduler.running = 1
    idle_calls.before_flush(scheduler)
    assert len(rig.scheduler.settled) == 4, "it waits though it will be refused"


def test_a_release_waits_for_the_other_dp_ranks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one is idle; the engine's part has a barrier in it."""
    others = [1]

    class Agreement:
        def __init__(self, _: Any) -> None:
            pass

        def minimum(self, values: list[int]) -> list[int]:
            return [min(value, others[0]) for value in values]

    monkeypatch.setattr(idle_calls, "RankAgreement", Agreement)
    others[0] = 0
    assert rig.release() is None
    assert not rig.updater.offload_tags
    others[0] = 1
    rig.step()
    assert len(rig.scheduler.answers) == 1
    assert rig.updater.offload_tags
