"""How long requests wait for storage, and for how long they wait in vain."""

from collections.abc import Callable

import numpy as np
import pytest

from sglang_ext.adapter import storage_tier
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Persist, Prefetch, StorageLimits
from tests.core.storage_ranks import PAGE, rank, tokens

LIMITS = StorageLimits(threshold_pages=1, stop_pages=16, prefetch_pages=40, persist_pages=8)


class Storage:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.lookups: list[Prefetch] = []
        self.reads: list[Prefetch] = []
        self._reports: list[Callable[[StorageLedger], None]] = []

    def submit_lookup(self, prefetch: Prefetch) -> None:
        self.lookups.append(prefetch)

    def submit_prefetch(self, prefetch: Prefetch) -> None:
        self.reads.append(prefetch)

    def submit_persist(self, persist: Persist) -> None:
        raise AssertionError("nothing to write")

    def answer(self, stops: list[int]) -> None:
        op = self.lookups.pop(0).op
        self._reports.append(lambda ledger: ledger.found(op, stops))

    def read(self) -> None:
        plan = self.reads.pop(0)
        self._reports.append(lambda ledger: ledger.read(plan.op, len(plan.stages)))
        self._reports.append(lambda ledger: ledger.over(plan.op))

    def poll(self, ledger: StorageLedger) -> None:
        while self._reports:
            self._reports.pop(0)(ledger)


class Tier:
    """A tier, its storage, and a clock in seconds."""

    def __init__(self, policy: str, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(storage_tier.time, "monotonic", lambda: self.now)
        self.engine = rank(storage_threshold=0)
        self.storage = Storage()
        patience = Patience(policy, 1000.0, 1000.0)
        self.tier = StorageTier(self.engine.index, self.storage, LIMITS, patience)  # type: ignore[arg-type]

    def ask(self, request: str, seed: int) -> None:
        pages = tokens(8, seed)[: 8 * PAGE].reshape(-1, PAGE)
        self.tier.prefetch(request, np.ascontiguousarray(pages), None)

    def step(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.tier.commit(self.tier.report())


def test_a_request_waits_until_its_pages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier("wait_complete", monkeypatch)
    tier.ask("a", 1)
    for _ in range(3):
        tier.step(5.0)
        assert not tier.tier.is_ready("a")
    tier.storage.answer([8])
    tier.step()
    assert not tier.tier.is_ready("a")
    tier.storage.read()
    tier.step()
    assert tier.tier.is_ready("a")
    assert tier.tier.pop_loaded("a") == (8 * PAGE, 0)
    assert tier.tier.pop_loaded("a") == (0, None)
    tier.engine.check()


def test_nothing_in_storage_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier("wait_complete", monkeypatch)
    tier.ask("a", 1)
    tier.storage.answer([])
    tier.step()
    assert tier.tier.is_ready("a")
    assert tier.tier.pop_loaded("a") == (0, None)


def test_best_effort_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier("best_effort", monkeypatch)
    tier.ask("a", 1)
    tier.step()
    assert tier.tier.is_ready("a")


def test_the_timeout_grows_with_what_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second, and one more for each 1,024 tokens."""
    tier = Tier("timeout", monkeypatch)
    tier.ask("a", 1)
    tier.step(1.1)
    assert not tier.tier.is_ready("a")
    tier.step(0.1)
    assert tier.tier.is_ready("a")


def test_a_storage_that_hangs_stops_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier("wait_complete", monkeypatch)
    tier.ask("a", 1)
    tier.step(29.0)
    assert not tier.tier.is_ready("a")
    tier.step(2.0)
    assert tier.tier.is_ready("a")


def test_after_three_in_vain_nobody_waits_before_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tier = Tier("timeout", monkeypatch)
    for number in range(3):
        tier.ask(f"vain {number}", number + 1)
        tier.step(2.0)
        assert tier.tier.is_ready(f"vain {number}")
    tier.ask("probe", 4)
    assert tier.tier.is_ready("probe"), "it waits for a storage that does not answer"
    tier.ask("other", 5)
    assert tier.tier.is_ready("other")
    assert len(tier.storage.lookups) == 4, "more than one probe"
    del tier.storage.lookups[:3]
    tier.storage.answer([])
    tier.step()
    tier.ask("again", 6)
    assert not tier.tier.is_ready("again"), "it has answered"


def test_who_goes_away_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier("wait_complete", monkeypatch)
    tier.ask("a", 1)
    tier.storage.answer([8])
    tier.step()
    tier.tier.forget("a")
    assert tier.tier.is_ready("a")
    tier.storage.read()
    tier.step()
    tier.engine.check_idle()
