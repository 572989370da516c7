"""What the core decides, step by step: a change of its form must leave all of it as it is.

    python -m tests.core.golden --check
    python -m tests.core.golden --record

For each seed a file beside this one has a digest of the fingerprints after every step; another one
has those of the learned policy, which no seed draws, and another one those with quotas. Whoever
changes a decision on purpose records them anew, and says so in the commit.
"""

import argparse
import hashlib
import json
import multiprocessing
from pathlib import Path

from sglang_ext.testing.simulation import Simulation

STEPS = 600
DRAWN, LEARNED, QUOTAS = None, "learned", "quotas"
"""Eviction policies: the one that a seed draws, and one that all have; and an operator who pins,
drops and gives namespaces quotas."""
SEEDS = {DRAWN: 300, LEARNED: 100, QUOTAS: 24}
RECORDS = {
    DRAWN: Path(__file__).with_suffix(".json"),
    LEARNED: Path(__file__).with_name("golden_learned.json"),
    QUOTAS: Path(__file__).with_name("golden_quotas.json"),
}


class Traced(Simulation):
    """A simulation that notes what its ranks hold after every step."""

    def run(self, steps: int) -> None:
        """See Simulation."""
        self.digest = hashlib.blake2b(digest_size=8)
        super().run(steps)

    def _check_ranks(self) -> None:
        super()._check_ranks()
        self.digest.update(self.engine.fingerprint().to_bytes(8, "little"))


def digest_of(seed: int, eviction: str | None = DRAWN) -> str:
    """The digest of a seed: of one rank or two, every third one with storage."""
    storage, operated = seed % 3 == 0, eviction == QUOTAS
    policy = DRAWN if operated else eviction
    simulation = Traced(
        seed,
        ranks=1 + seed % 2,
        storage=storage,
        eviction=policy,
        operator=operated,
        quotas=operated,
    )
    simulation.run(STEPS)
    return simulation.digest.hexdigest()


def recorded(eviction: str | None) -> list[str]:
    """The digests on record."""
    digests: list[str] = json.loads(RECORDS[eviction].read_text())
    return digests


def now(eviction: str | None) -> list[str]:
    """The digests as they are."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        return pool.starmap(digest_of, [(seed, eviction) for seed in range(SEEDS[eviction])])


def different(eviction: str | None) -> list[int]:
    """Seeds whose digest is not what was recorded."""
    pairs = zip(now(eviction), recorded(eviction), strict=True)
    return [seed for seed, (digest, before) in enumerate(pairs) if digest != before]


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--record", action="store_true", help="write the digests")
    mode.add_argument("--check", action="store_true", help="compare with those written")
    failed = False
    is_record = parser.parse_args().record
    for eviction, seeds in SEEDS.items():
        if is_record:
            RECORDS[eviction].write_text(json.dumps(now(eviction), indent=0) + "\n")
            continue
        others = different(eviction)
        failed |= bool(others)
        print(f"{eviction or 'drawn'}: {seeds} seeds of {STEPS} steps: {len(others)} different")
        print(*others)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
