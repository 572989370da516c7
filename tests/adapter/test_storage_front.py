"""Attach, detach and a settled cache: the same collectives on every rank, whatever fails where."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_ext.adapter import controller as controller_module
from sglang_ext.adapter.controller import HostTierController
from sglang_ext.adapter.storage_front import StorageFront
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.background import BackgroundStorage
from sglang_ext.transfer.layer_counter import LayerDoneCounter
from tests.core.storage_ranks import PAGE
from tests.core.test_index import engine_with, prompt, serve

RANKS = 2
LIMITS = StorageLimits(threshold_pages=1, stop_pages=16, prefetch_pages=40, persist_pages=8)


class Collectives:
    """What two ranks agree on; a rank that comes alone, or with other values, breaks it."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=120.0)
        self._values: dict[int, list[int]] = {}

    def minimum(self, rank: int, values: Sequence[int]) -> list[int]:
        self._values[rank] = list(values)
        self._barrier.wait()
        pairs = list(zip(*self._values.values(), strict=True))
        self._barrier.wait()
        return [min(pair) for pair in pairs]


class Agreement:
    """One rank's side."""

    def __init__(self, collectives: Collectives, rank: int) -> None:
        self._collectives, self._rank = collectives, rank

    def minimum(self, values: Sequence[int]) -> list[int]:
        return self._collectives.minimum(self._rank, values)


class NoTransfers:
    """A transfer engine with nothing to do."""

    def backed_up(self) -> tuple[int, range]:
        return -1, range(0)

    def loaded(self) -> int:
        return -1


class Store:
    """A page store that holds writes up until it is told to go on.

    Attributes:
        begun: set when one has come.
    """

    def __init__(self) -> None:
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.go_on.set()
        self.closed = False
        self.written = 0

    def has(self, key: bytes) -> bool:
        return True

    def store(self, component: int, objects: Any) -> int:
        self.begun.set()
        assert self.go_on.wait(120.0)
        self.written += len(objects)
        return len(objects)

    def use(self, keys: object, windows: object) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Setup:
    """Opens storage on one rank, or fails as it is told to."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.store = Store()
        self.error: BaseException | None = None
        self.half_open = False
        self.weights = SimpleNamespace(is_nobodys=False)

    def identity(self) -> bytes:
        return b"the same on every rank"

    def open(self, *_: Any) -> tuple[StorageTier, Any]:
        if self.error is not None and not self.half_open:
            raise self.error
        background = BackgroundStorage(self.store, Geometry(PAGE, 2 * PAGE))  # type: ignore[arg-type]
        tier = StorageTier(self.index, background, LIMITS, Patience("best_effort", 0.0, 0.0))
        if self.error is not None:
            raise self.error
        return tier, self.store


class Rank:
    """What the engine calls of one rank's tree cache."""

    def __init__(self, collectives: Collectives, number: int) -> None:
        self.engine = engine_with()
        self.index = self.engine.index
        self.controller = HostTierController(
            self.index,
            NoTransfers(),  # type: ignore[arg-type]
            LayerDoneCounter(2),
            Agreement(collectives, number),  # type: ignore[arg-type]
        )
        self.setup = Setup(self.index)
        self.front = StorageFront(self.index, lambda: False)
        self.front.use(self.controller, self.setup)  # type: ignore[arg-type]

    def attach(self) -> tuple[bool, str]:
        return self.front.attach("file", None, "m", "best_effort")

    def detach(self) -> tuple[bool, str]:
        return self.front.detach()


@pytest.fixture
def ranks() -> list[Rank]:
    collectives = Collectives()
    return [Rank(collectives, number) for number in range(RANKS)]


def together(ranks: list[Rank], call: Callable[[Rank], Any]) -> list[Any]:
    """The same call on every rank at the same time, as the engine makes it."""
    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(call, ranks))


def step(ranks: list[Rank]) -> None:
    """A step of the scheduler; fails where ranks do not report the same."""
    together(ranks, lambda rank: rank.controller.commit_finished())


@pytest.mark.parametrize("half_open", [False, True], ids=["before the tier", "after the tier"])
@pytest.mark.parametrize(
    "error",
    [PermissionError("weights"), KeyError("x"), SystemExit("backend"), StartupError("no")],
    ids=["permission", "key", "exit", "start"],
)
def test_an_attach_that_fails_on_one_rank_fails_on_all(
    ranks: list[Rank], error: BaseException, half_open: bool
) -> None:
    ranks[1].setup.error, ranks[1].setup.half_open = error, half_open
    answers = together(ranks, Rank.attach)
    assert [done for done, _ in answers] == [False, False]
    assert str(error) in answers[1][1]
    assert "another rank" in answers[0][1]
    assert [rank.front.tier for rank in ranks] == [None, None]
    assert [rank.index.attachment.limits for rank in ranks] == [None, None]
    assert not any(rank.front.tier for rank in ranks)
    step(ranks)
    ranks[1].setup.error = None
    assert [done for done, _ in together(ranks, Rank.attach)] == [True, True]
    step(ranks)
    assert [done for done, _ in together(ranks, Rank.detach)] == [True, True]
    assert all(rank.setup.store.closed for rank in ranks)
    step(ranks)


def test_a_detach_that_one_rank_cannot_make_is_made_on_none(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host memory that storage still writes must not be handed out again."""
    together(ranks, Rank.attach)
    assert ranks[1].front.tier is not None
    monkeypatch.setattr(ranks[1].front.tier, "drain", lambda: False)
    answers = together(ranks, Rank.detach)
    assert [done for done, _ in answers] == [False, False]
    assert all(rank.front.tier for rank in ranks)
    step(ranks)


def test_a_reset_while_storage_uses_host_memory_is_a_bug(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    together(ranks, Rank.attach)
    assert ranks[0].front.tier is not None
    monkeypatch.setattr(ranks[0].front.tier, "drain", lambda: False)
    with pytest.raises(AssertionError, match="hands out again"):
        ranks[0].front.tier.reset()


def with_a_path_to_write(ranks: list[Rank]) -> None:
    """A prompt is on every rank's host, and storage, which holds writes up, is told to take it."""
    for rank in ranks:
        serve(rank.engine, prompt(6))
        rank.engine.settle()
        assert np.count_nonzero(rank.index.table.host.ready) == 6
    together(ranks, Rank.attach)
    for rank in ranks:
        rank.setup.store.go_on.clear()
    step(ranks)
    assert all(rank.controller.is_busy for rank in ranks)


def settle(rank: Rank, *, give_up: bool) -> None:
    rank.controller.settle(give_up=give_up)


def test_what_storage_was_promised_is_waited_for(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is late on a busy machine comes, too
    monkeypatch.setattr(controller_module, "SECONDS_TO_SETTLE", 120.0)
    with_a_path_to_write(ranks)
    timers = [threading.Timer(0.05 * (1 + n), r.setup.store.go_on.set) for n, r in enumerate(ranks)]
    for timer in timers:
        timer.start()
    together(ranks, lambda rank: settle(rank, give_up=False))
    assert not any(rank.controller.is_busy for rank in ranks)
    written = [rank.setup.store.written for rank in ranks]
    assert written[0] == written[1] >= 6


def test_what_takes_too_long_is_not_waited_for(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's storage is done at once, the other's is not."""
    monkeypatch.setattr(controller_module, "SECONDS_TO_SETTLE", 0.05)
    with_a_path_to_write(ranks)
    ranks[0].setup.store.go_on.set()
    together(ranks, lambda rank: settle(rank, give_up=False))
    assert all(rank.controller.is_busy for rank in ranks)
    ranks[1].setup.store.go_on.set()


def test_what_takes_too_long_is_given_up_on_every_rank(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write that has begun ends, what comes after it is not written."""
    monkeypatch.setattr(controller_module, "SECONDS_TO_SETTLE", 0.05)
    with_a_path_to_write(ranks)
    fast, slow = (rank.front.tier for rank in ranks)
    assert fast is not None
    assert slow is not None
    ranks[0].setup.store.go_on.set()
    assert fast.drain(), "all of it is written"
    assert ranks[1].setup.store.begun.wait(120.0)
    give_up = type(slow).give_up

    def give_up_and_go_on(tier: StorageTier) -> None:
        give_up(tier)
        if tier is slow:
            ranks[1].setup.store.go_on.set()
        # from here on it ends
        monkeypatch.setattr(controller_module, "SECONDS_TO_SETTLE", 120.0)

    monkeypatch.setattr(StorageTier, "give_up", give_up_and_go_on)
    together(ranks, lambda rank: settle(rank, give_up=True))
    assert not any(rank.controller.is_busy for rank in ranks)
    assert ranks[1].setup.store.written == 6 < ranks[0].setup.store.written
    step(ranks)
