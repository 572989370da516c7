"""State machine over the index: what traffic does, on tiny pools, with an oracle."""

import numpy as np
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from sglang_ext.core.geometry import Geometry
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import DeviceFullError, SimEngine, SimRequest, Sizes


class IndexMachine(RuleBasedStateMachine):
    """Requests whose prompts derive from earlier prompts, over a two-token alphabet."""

    @initialize(
        device_page=st.sampled_from([1, 2, 16, 32]),
        window=st.sampled_from([1, 5, 16, 31, 40, 70]),
        pages=st.integers(3, 24),
        window_share=st.sampled_from([0.5, 0.8, 1.0]),
        host_pages=st.integers(0, 24),
        host_window_pages=st.integers(1, 12),
        checkpoint_pages=st.integers(1, 6),
        low_share=st.sampled_from([1, 2, 4, 100]),
        write=st.sampled_from(WritePolicy),
    )
    def build(
        self,
        device_page: int,
        window: int,
        pages: int,
        window_share: float,
        host_pages: int,
        host_window_pages: int,
        checkpoint_pages: int,
        low_share: int,
        write: WritePolicy,
    ) -> None:
        geometry = Geometry(device_page, window)
        self.page = geometry.page_tokens
        window_pages = max(int(pages * window_share), geometry.window_pages + 2)
        sizes = Sizes(
            device_pages=pages,
            device_window_pages=window_pages,
            host_pages=host_pages,
            host_window_pages=host_window_pages,
            checkpoint_pages=checkpoint_pages,
            low_share=low_share,
            write=write,
        )
        self.engine = SimEngine(geometry, sizes)
        self.histories: list[NDArray[np.int64]] = []

    @rule(
        base=st.integers(0, 50),
        cut=st.floats(0, 1),
        tail=st.integers(1, 60),
        bit=st.integers(0, 1),
        namespace=st.sampled_from([None, None, None, "lora"]),
        chunk=st.integers(1, 80),
    )
    def serve(
        self, base: int, cut: float, tail: int, bit: int, namespace: object, chunk: int
    ) -> None:
        """Start a request whose prompt is a cut of an earlier one and a new tail."""
        if len(self.engine.running) >= 3:
            return
        old = self.histories[base % len(self.histories)] if self.histories else np.empty(0)
        # most conversations go on at their end
        keep = len(old) if cut > 0.6 else int(len(old) * cut)
        tokens = np.concatenate((old[:keep], np.full(tail, bit))).astype(np.int64)[:400]
        request = self.engine.start(tokens, namespace)
        if request is not None:
            self.step(request, chunk)
            self.histories.append(tokens)

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

    @rule(kind=st.sampled_from(TransferKind))
    def copy(self, kind: TransferKind) -> None:
        """A transfer is executed."""
        self.engine.copy(kind)

    @rule(kind=st.sampled_from(TransferKind), ok=st.sampled_from([True, True, True, False]))
    def commit(self, kind: TransferKind, ok: bool) -> None:
        """An executed transfer is committed, or reported as failed."""
        self.engine.commit(kind, ok=ok)

    @rule(pages=st.integers(0, 6), windows=st.integers(0, 6))
    def evict(self, pages: int, windows: int) -> None:
        """The engine asks for room."""
        index = self.engine.index
        table = index.table
        possible = table.device.n_evictable, table.swa_device.n_evictable
        freed, freed_windows = index.evict_device(pages, windows)
        assert freed >= min(pages, possible[0])
        assert freed_windows >= min(windows, possible[1])

    @precondition(lambda self: not self.engine.running)
    @rule()
    def idle(self) -> None:
        """All transfers end; nothing may be held."""
        self.engine.settle()
        self.engine.check_idle()

    def pick(self, which: int) -> SimRequest:
        return self.engine.running[which % len(self.engine.running)]

    def step(self, request: SimRequest, chunk: int) -> None:
        try:
            self.engine.compute(request, chunk)
        except DeviceFullError:
            event("retracted")
            self.engine.abort(request)
        else:
            if request.done:
                self.engine.finish(request)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()


IndexMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60)
TestIndexMachine = IndexMachine.TestCase
