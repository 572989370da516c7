"""Seeded traffic against the simulated engine: denser than a search, and replayable.

python -m sglang_ext.testing.simulation --seed 7 --steps 20000
"""

import argparse
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.geometry import Geometry
from sglang_ext.core.plan import TransferKind
from sglang_ext.testing.engine import DeviceFullError, SimEngine, SimRequest

_MAX_RUNNING = 4
_MAX_PROMPT = 400
_KEPT_HISTORIES = 24
_CHECK_EVERY = 5


class Simulation:
    """One engine with random sizes and random traffic, both from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        geometry = Geometry(rng.choice([1, 2, 16, 32]), rng.choice([1, 16, 31, 40, 70]))
        self.page = geometry.page_tokens
        pages = rng.randint(4, 24)
        window_pages = max(geometry.window_pages + 2, int(pages * rng.choice([0.5, 0.8, 1.0])))
        self.engine = SimEngine(
            geometry,
            pages,
            window_pages,
            host_pages=rng.choice([0, 2, 4, 8, 16, 32]),
            host_window_pages=rng.randint(1, 16),
            checkpoint_pages=rng.randint(1, 6),
            pinned_share=rng.choice([1, 1, 4]),
        )
        self.histories: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        self.actions: list[tuple[int, Callable[[], None]]] = [
            (20, self.serve),
            (30, self.advance),
            (3, self.abort),
            (15, self.copy),
            (15, self.commit),
            (4, self.evict_some),
            (4, self.evict_all),
            (1, self.settle),
        ]

    def run(self, steps: int) -> None:
        """Random steps, with the invariants checked on the way, then an idle check.

        Raises:
            AssertionError: the cache is wrong.
        """
        weights = [weight for weight, _ in self.actions]
        actions = [action for _, action in self.actions]
        for step, action in enumerate(self.rng.choices(actions, weights, k=steps)):
            action()
            if step % _CHECK_EVERY == 0:
                self.engine.check()
        for request in list(self.engine.running):
            self.engine.abort(request)
        self.engine.settle()
        self.engine.check_idle()

    def serve(self) -> None:
        """A request that goes on with, branches off, or repeats an earlier prompt."""
        if len(self.engine.running) >= _MAX_RUNNING:
            return
        rng = self.rng
        old = rng.choice(self.histories)
        keep = len(old) if rng.random() < 0.5 else rng.randint(0, len(old))
        tail = rng.choice([1, rng.randint(1, 60)])
        if rng.random() < 0.3:  # a match must end exactly at the cut
            keep = keep // self.page * self.page
        bits = [rng.randint(0, 1)] * tail if rng.random() < 0.7 else rng.choices((0, 1), k=tail)
        tokens = np.concatenate((old[:keep], np.array(bits, dtype=np.int64)))[:_MAX_PROMPT]
        request = self.engine.start(tokens, rng.choice([None, None, None, "lora"]))
        if request is not None:
            self.histories = [*self.histories[-_KEPT_HISTORIES:], tokens]

    def advance(self) -> None:
        """A chunk of a running request."""
        if not self.engine.running:
            return
        request = self.rng.choice(self.engine.running)
        try:
            self.engine.compute(request, self.rng.randint(1, 80))
        except DeviceFullError:
            self.retract(request)
        else:
            if request.done:
                self.engine.finish(request)

    def retract(self, request: SimRequest) -> None:
        """The device is full."""
        self.engine.seen.add("retracted")
        self.engine.abort(request)

    def abort(self) -> None:
        """A client goes away."""
        if self.engine.running:
            self.engine.abort(self.rng.choice(self.engine.running))

    def copy(self) -> None:
        """A transfer is executed."""
        self.engine.copy(self.rng.choice(list(TransferKind)))

    def commit(self) -> None:
        """An executed transfer is committed; one backup in eight has failed."""
        kind = self.rng.choice(list(TransferKind))
        self.engine.commit(kind, ok=self.rng.random() < 0.875)

    def evict_some(self) -> None:
        """A little room."""
        self.engine.index.evict_device(self.rng.randint(0, 2), self.rng.randint(0, 3))

    def evict_all(self) -> None:
        """Whatever is not held leaves the device: the next hit is on the host."""
        self.engine.index.evict_device(99, 99)

    def settle(self) -> None:
        """All transfers end."""
        self.engine.settle()


def main() -> None:
    """Run one seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    simulation = Simulation(args.seed)
    simulation.run(args.steps)
    print(sorted(simulation.engine.seen), simulation.engine.index.counters.as_dict())


if __name__ == "__main__":
    main()
