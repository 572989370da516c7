"""No step publishes much: counted in calls, whatever they cost on a machine."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.metrics import Counter, Gauge

from sglang_ext.adapter import metrics
from sglang_ext.adapter.metrics import DeviceSizes, IndexMetrics
from sglang_ext.adapter.publishing import A_STEP, PATIENCE, Publishing, Update
from sglang_ext.core.counters import NAMES
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.fixtures.registry import own_registry


class Work:
    """Looks that find what was left for them, and note what is done in a step."""

    def __init__(self) -> None:
        self.left: list[list[int]] = [[], [], []]
        self.looks: list[int] = []
        self.made: list[int] = []

    def look(self, number: int) -> Iterator[Update]:
        """Finds what is there now, and no more than is asked for."""
        self.looks.append(number)
        found, self.left[number] = self.left[number], []
        return (partial(self.made.append, value) for value in found)

    def publishing(self) -> Publishing:
        """Of these looks."""
        return Publishing(partial(self.look, number) for number in range(len(self.left)))


def round_of(work: Work, publishing: Publishing) -> list[tuple[int, int]]:
    """(looks, updates) of each step until a round has ended."""
    steps: list[tuple[int, int]] = []
    ended = False
    while not ended:
        before = len(work.looks), len(work.made)
        ended = publishing.step()
        steps.append((len(work.looks) - before[0], len(work.made) - before[1]))
    return steps


def test_a_step_makes_one_look_or_a_few_updates() -> None:
    work = Work()
    publishing = work.publishing()
    for _ in range(2):
        work.looks.clear()
        work.made.clear()
        work.left = [list(range(7)), [], list(range(7, 30))]
        steps = round_of(work, publishing)
        assert work.made == list(range(30))
        assert work.looks == [0, 1, 2]
        assert all(
            looks + updates <= A_STEP and not (looks and updates) for looks, updates in steps
        )


def test_a_round_ends_however_much_there_is() -> None:
    """More jobs may end in a step than a step publishes."""
    work = Work()
    work.left[1] = list(range(10_000))
    steps = round_of(work, work.publishing())
    assert len(work.made) == 10_000
    assert len(steps) < 12 * PATIENCE
    assert max(updates for _, updates in steps[: PATIENCE - 1]) == A_STEP


def test_all_at_once_has_what_came_after_a_look() -> None:
    work = Work()
    publishing = work.publishing()
    work.left = [[1, 2, 3, 4, 5], [6], []]
    for _ in range(2):
        publishing.step()
    work.left[0] = [7]
    publishing.whole()
    assert work.made == [1, 2, 3, 4, 5, 7, 6]
    work.looks.clear()
    round_of(work, publishing)
    assert work.looks == [0, 1, 2]


def test_no_step_of_a_server_writes_more_values_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All counters and gauges have changed, and each write is counted."""
    own_registry(monkeypatch)
    writes: list[str] = []

    def counted(name: str, method: Any) -> Any:
        def call(*values: Any) -> Any:
            writes.append(name)
            return method(*values)

        return call

    for kind, name in ((Counter, "inc"), (Gauge, "set")):
        monkeypatch.setattr(kind, name, counted(name, getattr(kind, name)))
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine = SimEngine(Geometry(16, 16), Sizes(8, 8))
    exported = IndexMetrics(engine.index, {"tp_rank": 0}, DeviceSizes((1, 1), (8, 8)), None)
    counters = engine.index.counters
    plain = [name for name in NAMES if hasattr(counters, name)]
    clock.now += 1
    for name in plain:
        setattr(counters, name, 1)
    of_step = []
    while sum(of_step) < len(plain):
        writes.clear()
        exported.publish()
        of_step.append(len(writes))
        assert len(of_step) < 100
    assert max(of_step) == A_STEP
