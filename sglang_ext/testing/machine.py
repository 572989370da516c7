"""Hypothesis state machine over the core: what traffic does, on tiny pools.

The index runs beside the model, every slot has contents, and every invariant is
checked after every rule. The test suite runs a short version; a long one, over the
whole grid of pages, windows and write policies:

    python -m sglang_ext.testing.machine --steps 2000000 --processes 2
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from hypothesis import HealthCheck, event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from sglang_ext.arguments import Parser, whole
from sglang_ext.core.device.victims import Spare
from sglang_ext.core.eviction_policy import EVERY
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import pages_of
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.control import SimControl
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.model import ModelledIndex
from sglang_ext.testing.pools import SimSlots
from sglang_ext.testing.requests import DeviceFullError, SimRequest
from sglang_ext.testing.sizes import PRIORITIES, Sizes

DEVICE_PAGES = (1, 2, 16)
WINDOWS = {"smaller": (1, 5), "equal": (16,), "larger": (31, 40, 70)}
"""Windows by their relation to a page of the table, 16 tokens."""
STEPS_AN_EXAMPLE = 80
_MAX_PROMPT = 400
_POOLS = (1, 2, 3, 4, 5, 6, 8, 8, 12, 12, 16, 16, 24, 40, 64)
_PRIORITIES = tuple(itertools.chain(*PRIORITIES))
_TAILS = (1, 15, 16, 17, 31, 32, 33, 48, 60, 75)


class IndexMachine(RuleBasedStateMachine):
    """Requests whose prompts derive from earlier prompts, over a two-token alphabet.

    Attributes:
        device_pages, windows, overlaps, policies: what a run draws from; subclasses narrow it.
        rule_steps: rules executed by all machines of the class.
        seen: what happened in them.
    """

    device_pages: Sequence[int] = (*DEVICE_PAGES, 32)
    windows: Sequence[int] = tuple(itertools.chain(*WINDOWS.values()))
    overlaps: Sequence[int] = (0, 0, 1)
    policies: Sequence[WritePolicy] = tuple(WritePolicy)
    rule_steps = 0
    seen: ClassVar[set[str]] = set()

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        """Pools of 1 to 64 pages, half of them of a few pages only, and a few requests."""
        few_or_many = st.sampled_from(_POOLS)
        geometry = Geometry(
            data.draw(st.sampled_from(self.device_pages)),
            data.draw(st.sampled_from(self.windows)),
            overlap=data.draw(st.sampled_from(self.overlaps)),
        )
        pages = data.draw(few_or_many)
        share = data.draw(st.sampled_from([0.1, 0.5, 0.8, 1.0]))
        sizes = Sizes(
            device_pages=pages,
            device_window_pages=max(1, int(pages * share)),
            host_pages=data.draw(st.one_of(*[few_or_many] * 4, st.just(0))),
            host_window_pages=data.draw(few_or_many),
            checkpoint_pages=data.draw(st.integers(0, 6)),
            pinned_share=data.draw(st.sampled_from([1, 2, 4])),
            low_share=data.draw(st.sampled_from([1, 1, 2, 4, 100])),
            write=data.draw(st.sampled_from(self.policies)),
            extent_pages=data.draw(st.sampled_from([0, 0, 2, 3])),
            eviction=data.draw(st.sampled_from(["learned", "learned", "lru", *EVERY])),
            rebuild=2 + pages % 3,
            more_ticks=(0, 1, 9)[pages % 3],
            dense_pages=(0, 1, 3)[pages % 5 % 3],
            host_is_ample=pages % 4 == 1,
            spare=Spare(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))),
        )
        self.demotes = data.draw(st.booleans())
        self.engine = SimEngine(geometry, sizes, index_type=ModelledIndex)
        self.control = SimControl(self.engine)
        self.histories: list[NDArray[np.int64]] = []
        # an example may have no rule that starts requests: Hypothesis leaves rules out
        for tail in data.draw(st.lists(st.sampled_from(_TAILS), min_size=2, max_size=8)):
            self.turn(data.draw(st.integers(0, 5)), 1.0, tail, tail % 2)
            while self.engine.running:
                self.step(self.pick(0), _MAX_PROMPT)
            if data.draw(st.booleans()):
                self.engine.settle()

    @rule(
        base=st.integers(0, 5),
        keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.2]),
        tail=st.sampled_from(_TAILS),
        bit=st.integers(0, 1),
        namespace=st.sampled_from([None, None, None, "lora"]),
        chunk=st.sampled_from([_MAX_PROMPT, _MAX_PROMPT, 40, 7]),
    )
    def serve(
        self, base: int, keep: float, tail: int, bit: int, namespace: object, chunk: int
    ) -> None:
        """Start a request whose prompt is a cut of an earlier one and a new tail."""
        if len(self.engine.running) < 3:
            self.turn(base, keep, tail, bit, namespace, chunk)

    @precondition(lambda self: self.engine.running)
    @rule(which=st.integers(0, 9), chunk=st.integers(1, 80))
    def advance(self, which: int, chunk: int) -> None:
        """One more chunk of a running request; it finishes at the end."""
        self.step(self.pick(which), chunk)

    @precondition(lambda self: self.engine.running)
    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        """A client goes away, or the engine retracts."""
        self.engine.abort(self.pick(which))

    @rule(base=st.integers(0, 5), keep=st.sampled_from([1.0, 0.5, 0.2]))
    def touch(self, base: int, keep: float) -> None:
        """A waiting request is matched and not admitted: its prefix is used, not locked."""
        if self.histories:
            history = self.histories[base % len(self.histories)]
            geometry, index = self.engine.geometry, self.engine.index
            count = geometry.whole_pages_in(int(len(history) * keep))
            index.residency.use(index.match(pages_of(history, count, geometry), None).rows)

    @rule(kind=st.sampled_from(TransferKind))
    def copy(self, kind: TransferKind) -> None:
        """A transfer is executed."""
        self.engine.copy(kind)

    @rule(kind=st.sampled_from(TransferKind), ok=st.booleans())
    def commit(self, kind: TransferKind, ok: bool) -> None:
        """A transfer is executed and committed, or reported as failed."""
        self.engine.copy(kind)
        self.engine.commit(kind, ok=ok)

    @rule()
    def settle(self) -> None:
        """All transfers end."""
        self.engine.settle()

    @rule()
    def demote(self) -> None:
        """Copies ahead of eviction, once a scheduler step."""
        self.engine.demote()

    @rule(
        pages=st.sampled_from([0, 1, 3, 99]),
        windows=st.sampled_from([0, 1, 3, 99]),
        abandon=st.booleans(),
    )
    def evict(self, pages: int, windows: int, abandon: bool) -> None:
        """The engine asks for room."""
        self.engine.index.evict_device(pages, windows, abandon_backups=abandon)

    @precondition(lambda self: self.engine.host.total)
    @rule(which=st.integers(0, 5))
    def rarely(self, which: int) -> None:
        """The next host allocation fails; or everything is forgotten in a flush, transfers
        in flight or not."""
        if which != 1 and isinstance(self.engine.host, SimSlots):
            self.engine.host.allocations_to_fail = 1
        elif which == 1 and not self.engine.running:
            self.engine.reset()
            self.engine.check_idle()
            assert self.engine.host.used == self.engine.host_window.used == 0
            self.control.flushed()

    @rule(
        call=st.sampled_from(["pin", "pin", "unpin", "drop"]),
        base=st.integers(0, 5),
        keep=st.sampled_from([1.0, 1.0, 0.5, 0.2]),
        namespace=st.sampled_from([None, None, "lora"]),
    )
    def operate(self, call: str, base: int, keep: float, namespace: object) -> None:
        """An operator pins or drops a part of a prompt, or gives up what came to nothing."""
        if self.histories:
            history = self.histories[base % len(self.histories)]
            getattr(self.control, call)(history[: int(len(history) * keep)], namespace)

    @rule(
        bound=st.sampled_from([None, 0, 2, 5, 12, 60]),
        namespace=st.sampled_from([None, None, "lora"]),
    )
    def quota(self, bound: int | None, namespace: object) -> None:
        """An operator bounds what a namespace may have of the host."""
        self.control.set_quota(namespace, bound)

    @rule()
    def look(self) -> None:
        """Pins that came to nothing are given up."""
        self.control.look()

    @precondition(lambda self: not self.engine.running)
    @rule()
    def idle(self) -> None:
        """All transfers end; nothing may be held."""
        self.engine.settle()
        self.control.look()
        for _ in range(20):
            self.engine.index.own_room.step()
        self.control.check_settled()
        self.engine.check_idle()

    def turn(
        self,
        base: int,
        keep: float,
        tail: int,
        bit: int,
        namespace: object = None,
        chunk: int = _MAX_PROMPT,
    ) -> None:
        """A request that goes on where the ``base``-th last one was, up to ``keep`` of it."""
        old = self.histories[-1 - base % len(self.histories)] if self.histories else np.empty(0)
        cut = old[: int(len(old) * keep)]
        tokens = np.concatenate((cut, np.full(tail, bit))).astype(np.int64)[:_MAX_PROMPT]
        self.histories.append(tokens)
        priority = _PRIORITIES[len(tokens) % len(_PRIORITIES)]
        self.step(self.engine.start(tokens, namespace, priority), chunk)

    def pick(self, which: int) -> SimRequest:
        """A running request."""
        return self.engine.running[which % len(self.engine.running)]

    def step(self, request: SimRequest, chunk: int) -> None:
        """A scheduler step with one chunk; without room the request is retracted."""
        try:
            self.engine.compute(request, chunk)
        except DeviceFullError:
            event("retracted")
            self.engine.abort(request)
        else:
            if request.done:
                self.engine.finish(request)
        if self.demotes:
            self.engine.demote()

    @invariant()
    def consistent(self) -> None:
        """Every invariant, every lock and every slot, after every rule."""
        if not hasattr(self, "engine"):
            return
        type(self).rule_steps += 1
        self.engine.check()
        self.engine.check_every_slot()
        self.control.check()

    def teardown(self) -> None:
        """Keep what was seen."""
        if hasattr(self, "engine"):
            self.seen.update(self.engine.seen)
            counted = self.engine.index.counters.as_dict().items()
            self.seen.update(name for name, count in counted if count)


def run(machine: type[IndexMachine], steps: int, first_seed: int) -> int:
    """Run fresh examples of ``machine`` until it has made ``steps``; returns how many.

    Raises:
        AssertionError: with the smallest failing sequence of rules that was found.
    """
    start, number = machine.rule_steps, first_seed
    budget = settings(
        max_examples=100,
        stateful_step_count=STEPS_AN_EXAMPLE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    while machine.rule_steps - start < steps:
        run_state_machine_as_test(seed(number)(machine), settings=budget)
        number += 1
    return machine.rule_steps - start


def _run_cell(job: tuple[int, str, WritePolicy, int, int]) -> tuple[str, int, set[str]]:
    page, relation, policy, steps, first_seed = job

    class Cell(IndexMachine):
        device_pages = (page,)
        windows = WINDOWS[relation]
        policies = (policy,)
        rule_steps = 0
        seen: ClassVar[set[str]] = set()

    name = f"page {page}, window {relation}, {policy.value}"
    return name, run(Cell, steps, first_seed), Cell.seen


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=whole(1), default=100_000, help="rule steps in all")
    parser.add_argument("--processes", type=whole(1), default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> None:
    """Run the grid."""
    args = parse_args()
    grid = list(itertools.product(DEVICE_PAGES, WINDOWS, WritePolicy))
    share = -(-args.steps // len(grid))
    jobs = [(*cell, share, args.seed) for cell in grid]
    started, total = time.monotonic(), 0
    seen: set[str] = set()
    with multiprocessing.Pool(args.processes) as pool:
        for name, steps, happened in pool.imap_unordered(_run_cell, jobs):
            total += steps
            seen |= happened
            print(f"{time.monotonic() - started:7.0f} s  {name}: {steps} steps", flush=True)
    print(f"{total} rule steps, no violation; reached: {', '.join(sorted(seen))}")


if __name__ == "__main__":
    main()
