"""Seeded traffic against simulated ranks: denser than a search, and replayable.

Every rank gets the same requests. Copies end at different times on each rank, some
fail, some layers are slow, and now and then a host allocation fails on one rank
only. After every step all ranks must hold the same table.

python -m sglang_ext.testing.simulation --seed 7 --steps 20000 --ranks 4
"""

import argparse
import dataclasses
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.arguments import Parser, whole
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.device.victims import Spare
from sglang_ext.core.eviction_policy import EVERY
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.control import SimControl
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.model import ModelledIndex
from sglang_ext.testing.pools import SimSlots
from sglang_ext.testing.requests import DeviceFullError
from sglang_ext.testing.sizes import PRIORITIES, Sizes
from sglang_ext.testing.storage import StorageFaults
from sglang_ext.testing.transfers import Pace

_MAX_RUNNING = 4
_MAX_WAITING = 6
_MAX_PROMPT = 400
_KEPT_HISTORIES = 24
_DRAWN = ("lru", "lru", "lru", "lfu", "slru", "priority")
"""Policies that seeds draw from. Another one is asked for by name: with one more here, all seeds
would do something else, and what they are known to find would have to be looked for anew."""
_CHECK_EVERY = 5
_MOST_STEPS_TO_IDLE = 5000
_STEPS_TO_SETTLE = 20
_CHECK_SLOTS_EVERY = 25


class Simulation:
    """Ranks with random sizes and random traffic, all from the seed.

    Args:
        modelled: run the first rank beside the model; slower.
        storage: there is a storage tier, with faults.
        eviction: name of an eviction policy; None for one that the seed draws.
        overlap: see ``Geometry``.
        operator: somebody pins and drops prefixes. What a seed does without is what it always did.
        quotas: somebody gives namespaces quotas.
        loops: what ranks run, in turns: they agree only if what is compiled does the same.
    """

    def __init__(  # noqa: PLR0913
        self,
        seed: int,
        ranks: int = 1,
        *,
        modelled: bool = False,
        storage: bool = False,
        eviction: str | None = None,
        overlap: int = 0,
        operator: bool = False,
        quotas: bool = False,
        loops: Sequence[Loops] = (COMPILED, INTERPRETED),
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.dice = random.Random(~seed)
        # contents are known by table page, keys in storage by device page: the same there
        device_page = rng.choice([16, 16, 32] if storage else [1, 2, 16, 32])
        geometry = Geometry(device_page, rng.choice([1, 16, 31, 40, 70]), overlap=overlap)
        self.page = geometry.page_tokens
        # what is not worth a backup never gets to storage
        pages = rng.randint(16, 48) if storage else rng.randint(4, 24)
        sizes = Sizes(
            device_pages=pages,
            device_window_pages=max(
                geometry.window_pages + 2, int(pages * rng.choice([0.3, 0.5, 0.8, 1.0]))
            ),
            host_pages=rng.choice([4, 16, 32, 64] if storage else [0, 2, 4, 8, 16, 32, 64]),
            host_window_pages=rng.choice([4, 16, 32] if storage else [1, 4, 8, 16, 32]),
            checkpoint_pages=rng.randint(0, 6),
            pinned_share=rng.choice([1, 1, 4]),
            low_share=rng.choice([1, 2, 4, 100]),
            write=rng.choice(list(WritePolicy)),
            extent_pages=rng.choice([0, 0, 2, 3, 5]),
            eviction=rng.choice(_DRAWN),
            storage_threshold=rng.randint(1, 3) if storage else 0,
            storage_stop=rng.randint(1, 4) if storage else 1,
            spare=Spare(seed % 5, seed % 4),
            storage_share=rng.choice([1, 1, 4]) if storage else 1,
            more_ticks=(0, 2, 50)[seed // 2 % 3],
            dense_pages=(0, 1, 3)[seed // 4 % 3],
            host_is_ample=seed % 4 == 1,
            storage_dense=(0, 2, 5)[seed // 12 % 3],
        )
        if eviction is not None:
            sizes = dataclasses.replace(sizes, eviction=eviction)
        if eviction == "learned":
            sizes = dataclasses.replace(sizes, rebuild=2 + seed % 7)
        layer = rng.choice([0.05, 0.2, 1.0] if storage else [0.1, 1.0, 4.0])
        pace = Pace(layer=layer, fails=rng.choice([0.0, 0.05]))
        self.allocation_fails = rng.choice([0.0, 0.03])
        self.patience = rng.choice([0.0, 0.01, 0.1])
        faults = _storage_faults(rng) if storage else None
        self.engines = [
            SimEngine(
                geometry,
                sizes,
                pace,
                seed * 1000 + rank,
                ModelledIndex if modelled and rank == 0 else PrefixCache,
                storage_faults=faults,
                loops=loops[rank % len(loops)],
            )
            for rank in range(ranks)
        ]
        self.engine = self.engines[0]
        self.histories: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        self.actions: list[tuple[float, Callable[[], None]]] = [
            (20, self.serve),
            (30, self.advance),
            (3, self.abort),
            (30, self.step),
            (3, self.evict_some),
            (2, self.evict_all),
            (0.1, self.flush),
        ]
        if storage:
            self.actions += [
                (40, self.admit),
                (2, self.leave),
                (0.7, self.restart),
                (2, self.evict_all),
            ]
        self.controls = []
        if operator or quotas:
            self.controls = [SimControl(engine) for engine in self.engines]
        if operator:
            self.actions += [(3, self.pin), (1, self.unpin), (2, self.drop)]
        if quotas:
            self.actions += [(3, self.set_quota)]

    def run(self, steps: int) -> None:
        """Random steps, with the invariants checked on the way, then an idle check.

        Raises:
            AssertionError: the cache is wrong, or the ranks differ.
        """
        weights = [weight for weight, _ in self.actions]
        actions = [action for _, action in self.actions]
        for step, action in enumerate(self.rng.choices(actions, weights, k=steps)):
            action()
            self._check_ranks()
            if step % _CHECK_EVERY == 0:
                for engine in self.engines:
                    engine.check()
            for control in self.controls:
                control.check()
            if step % _CHECK_SLOTS_EVERY == 0:
                for engine in self.engines:
                    engine.check_every_slot()
        self._abort_all()
        for _ in range(_MOST_STEPS_TO_IDLE):
            if not any(engine.is_busy for engine in self.engines):
                break
            self.step()
        assert not any(engine.is_busy for engine in self.engines), "transfers never end"
        for arrival in self.engine.waiting:
            assert self.engine.is_ready(arrival), "a request waits for ever"
        self._settle_quotas()
        for engine in self.engines:
            engine.check_every_slot()
            engine.check_idle()

    def _settle_quotas(self) -> None:
        """What namespaces have beyond their quotas goes."""
        if not self.engine.index.quotas.bounds:
            return
        for _ in range(_STEPS_TO_SETTLE):
            for engine in self.engines:
                engine.index.own_room.step()
        for control in self.controls:
            control.check()
            control.check_settled()

    def _check_ranks(self) -> None:
        if len(self.engines) > 1:
            marks = {engine.fingerprint() for engine in self.engines}
            assert len(marks) == 1, "the ranks hold different tables"

    # ---- what the scheduler does ---------------------------------------------

    def step(self) -> None:
        """A step of the scheduler: copies go on, one collective, commits, demotions."""
        if self.rng.random() < self.allocation_fails:
            unlucky = self.rng.choice(self.engines).host
            if isinstance(unlucky, SimSlots):
                unlucky.allocations_to_fail = 1
        duration = self.rng.choice([0.0, 1.0, 1.0, 3.0])
        for engine in self.engines:
            engine.pass_time(duration)
        agreed = _minimum([engine.report() for engine in self.engines])
        storage = _minimum([engine.storage_report() for engine in self.engines])
        for engine in self.engines:
            engine.ledger.commit(agreed)
            engine.commit_storage(storage)
            engine.demote()
        for control in self.controls:
            control.look()

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
        namespace = rng.choice([None, None, None, ("lora", None)])
        priority = self.dice.choice(rng.choice(PRIORITIES))
        for engine in self.engines:
            if engine.storage and len(engine.waiting) < _MAX_WAITING:
                engine.arrive(tokens, namespace, priority)
            else:
                engine.start(tokens, namespace, priority)
        self.histories = [*self.histories[-_KEPT_HISTORIES:], tokens]

    def admit(self) -> None:
        """The scheduler takes a request that waits for storage, or goes on waiting."""
        waiting = self.engine.waiting
        if not waiting or len(self.engine.running) >= _MAX_RUNNING:
            return
        number = self.rng.randrange(len(waiting))
        ready = [engine.is_ready(engine.waiting[number]) for engine in self.engines]
        assert len(set(ready)) == 1, "a request is ready on some ranks only"
        if ready[0] or self.rng.random() < self.patience:
            for engine in self.engines:
                engine.admit(number)

    def leave(self) -> None:
        """A client goes away while its request waits."""
        if self.engine.waiting:
            number = self.rng.randrange(len(self.engine.waiting))
            for engine in self.engines:
                engine.leave(number)

    def restart(self) -> None:
        """Device and host are empty, storage is not."""
        self.flush()

    def advance(self) -> None:
        """A chunk of a running request; it finishes at its end."""
        if not self.engine.running:
            return
        which = self.rng.randrange(len(self.engine.running))
        count = self.rng.randint(1, 80)
        checkpoint = self.rng.random() < 0.7
        full = [self._compute(engine, which, count, checkpoint) for engine in self.engines]
        assert len(set(full)) == 1, "the device is full on some ranks only"

    def _compute(self, engine: SimEngine, which: int, count: int, checkpoint: bool) -> bool:
        request = engine.running[which]
        try:
            engine.compute(request, count, checkpoint=checkpoint)
        except DeviceFullError:
            engine.seen.add("retracted")
            engine.abort(request)
            return True
        if request.done:
            engine.finish(request)
        return False

    def abort(self) -> None:
        """A client goes away."""
        if self.engine.running:
            which = self.rng.randrange(len(self.engine.running))
            for engine in self.engines:
                engine.abort(engine.running[which])

    def _abort_all(self) -> None:
        while self.engine.running:
            self.abort()

    def evict_some(self) -> None:
        """A little room."""
        pages, windows = self.rng.randint(0, 2), self.rng.randint(0, 3)
        for engine in self.engines:
            engine.index.evict_device(pages, windows)

    def evict_all(self) -> None:
        """Whatever is not held leaves the device: the next hit is on the host."""
        for engine in self.engines:
            engine.index.evict_device(99, 99)

    def flush(self) -> None:
        """All requests end, and everything is forgotten while copies are in flight."""
        self._abort_all()
        for engine in self.engines:
            while engine.waiting:
                engine.leave(0)
            if engine.is_busy:
                engine.seen.add("flush in flight")
            engine.reset()
        for control in self.controls:
            control.flushed()

    # ---- what an operator does -------------------------------------------------

    def _asked(self) -> tuple[NDArray[np.int64], Hashable]:
        """A prompt that was served, or a part of one."""
        tokens = self.rng.choice(self.histories)
        if self.rng.random() < 0.5:
            tokens = tokens[: self.rng.randint(0, len(tokens))]
        return tokens, self.rng.choice([None, None, ("lora", None)])

    def pin(self) -> None:
        """A prefix stays on the host."""
        tokens, namespace = self._asked()
        for control in self.controls:
            control.pin(tokens, namespace)

    def unpin(self) -> None:
        """One does no longer, or none does."""
        pinned = self.controls[0].pinned
        tokens, namespace = self.rng.choice(pinned) if pinned else self._asked()
        everything = self.rng.random() < 0.3
        for control in self.controls:
            control.unpin_all() if everything else control.unpin(tokens, namespace)

    def drop(self) -> None:
        """A prefix is forgotten, or a namespace."""
        tokens, namespace = self._asked()
        everything = self.rng.random() < 0.1
        for control in self.controls:
            if everything:
                control.drop_namespace(namespace)
            else:
                control.drop(tokens, namespace)

    def set_quota(self) -> None:
        """A namespace may have a part of the host, or all again."""
        index, namespace = self.engine.index, self.rng.choice([None, ("lora", None)])
        most = index.quotas.bytes_of(index.host.free_pages + index.host.column.n_present, 4)
        bound = self.rng.choice([None, 0, most // 8, most // 8, most // 4, most // 2])
        for control in self.controls:
            control.set_quota(namespace, bound)


def _storage_faults(rng: random.Random) -> StorageFaults:
    return StorageFaults(
        mean=rng.choice([0.05, 0.5, 3.0]),
        hangs=rng.choice([0.0, 0.0, 0.01]),
        unreadable=rng.choice([0.0, 0.0, 0.2]),
        unwritable=rng.choice([0.0, 0.0, 0.1]),
        forgets=rng.choice([0.0, 0.0, 0.4]),
    )


def _minimum(reports: list[list[int]]) -> list[int]:
    return [min(values) for values in zip(*reports, strict=True)]


def _run_seed(
    job: tuple[int, int, int, bool, str | None, int, bool, bool],
) -> tuple[set[str], Counter[str]]:
    seed, steps, ranks, storage, eviction, overlap, operator, quotas = job
    simulation = Simulation(
        seed,
        ranks,
        storage=storage,
        eviction=eviction,
        overlap=overlap,
        operator=operator,
        quotas=quotas,
    )
    try:
        simulation.run(steps)
    except Exception as error:
        option = " --storage" * storage + " --drafts" * overlap
        option += " --operator" * operator + " --quotas" * quotas
        option += f" --eviction {eviction}" if eviction else ""
        error.add_note(f"replay: --seed {seed} --steps {steps} --ranks {ranks}{option}")
        raise
    return simulation.engine.seen, Counter(simulation.engine.index.counters.as_dict())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=whole(1), default=1, help="how many")
    parser.add_argument("--steps", type=whole(1), default=20_000)
    parser.add_argument("--ranks", type=whole(1), default=1)
    parser.add_argument("--processes", type=whole(1), default=1)
    parser.add_argument("--storage", action="store_true", help="with a storage tier")
    parser.add_argument(
        "--drafts", action="store_true", help="KV of a position is of the next token as well"
    )
    parser.add_argument("--operator", action="store_true", help="somebody pins and drops prefixes")
    parser.add_argument("--quotas", action="store_true", help="somebody gives namespaces quotas")
    parser.add_argument("--eviction", choices=EVERY, help="policy; drawn by each seed as a rule")
    return parser.parse_args(argv)


def main() -> None:
    """Run one seed, or many."""
    args = parse_args()
    seeds = range(args.seed, args.seed + args.seeds)
    how = args.storage, args.eviction, int(args.drafts), args.operator, args.quotas
    jobs = [(seed, args.steps, args.ranks, *how) for seed in seeds]
    seen: set[str] = set()
    counted: Counter[str] = Counter()
    with multiprocessing.Pool(args.processes) as pool:
        for happened, counters in pool.imap_unordered(_run_seed, jobs):
            seen |= happened
            counted += counters
    print(f"{args.seeds} seeds, {args.ranks} ranks, {args.steps} steps each: no contradiction")
    print(f"reached: {', '.join(sorted(seen))}")
    print(dict(counted))


if __name__ == "__main__":
    main()
