"""What the core decides, step by step: a change of its form must leave all of it as it is.

    python -m tests.core.golden --check
    python -m tests.core.golden --record

For each seed the file beside this one has a digest of the fingerprints after every step. Whoever
changes a decision on purpose records them anew, and says so in the commit.
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path

from sglang_ext.testing.simulation import Simulation

SEEDS, STEPS = 300, 600
RECORD = Path(__file__).with_suffix(".json")


class Traced(Simulation):
    """A simulation that notes what its ranks hold after every step."""

    def run(self, steps: int) -> None:
        """See Simulation."""
        self.digest = hashlib.blake2b(digest_size=8)
        super().run(steps)

    def _check_ranks(self) -> None:
        super()._check_ranks()
        self.digest.update(self.engine.fingerprint().to_bytes(8, "little"))


def digest_of(seed: int) -> str:
    """The digest of a seed: of one rank or two, every third one with storage."""
    simulation = Traced(seed, ranks=1 + seed % 2, storage=seed % 3 == 0)
    simulation.run(STEPS)
    return simulation.digest.hexdigest()


def different(seeds: Iterable[int]) -> list[int]:
    """Seeds whose digest is not what was recorded."""
    recorded = json.loads(RECORD.read_text())
    with multiprocessing.get_context("spawn").Pool() as pool:
        return [
            seed
            for seed, digest in zip(seeds, pool.imap(digest_of, seeds), strict=True)
            if digest != recorded[seed]
        ]


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--record", action="store_true", help="write the digests")
    mode.add_argument("--check", action="store_true", help="compare with those written")
    if parser.parse_args().record:
        with multiprocessing.get_context("spawn").Pool() as pool:
            digests = pool.map(digest_of, range(SEEDS))
        RECORD.write_text(json.dumps(digests, indent=0) + "\n")
        return
    seeds = different(range(SEEDS))
    print(f"{SEEDS} seeds of {STEPS} steps: {len(seeds)} different {seeds}")
    raise SystemExit(bool(seeds))


if __name__ == "__main__":
    main()
