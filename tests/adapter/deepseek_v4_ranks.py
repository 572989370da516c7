"""A child process of test_deepseek_v4_ranks: ranks of a server over the engine's pools, in trouble.

Each rank is a process with pools, a table, copies and files of its own, and the ranks agree by gloo
as they do in a server. Every one has rows of its own, which name its number and the whole prefix,
and compares what it reads in every plane. All of it is from one seed, beside the timing:

- files are damaged, cut off and removed between requests;
- storage declines writes, raises, and fails to read with rubbish left behind;
- copies to the host are slow, are reported late, and fail, on one rank at a time;
- the host is full;
- the server is killed with requests' copies on their way, and another one starts on its storage.

Prints one line of JSON for each life of each rank, and ends with an error if a rank does.

    python -m tests.adapter.deepseek_v4_ranks DIRECTORY [BUG] [--ranks N] [--dp N] [--seed N] [...]
"""

import argparse
import contextlib
import datetime
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sglang.srt.mem_cache.pool_host import base

from sglang_ext.adapter.byte_pages import ByteHost
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.config import REPORT_DELAY, SLOWDOWN
from sglang_ext.core.moves.ledger import Ledger
from sglang_ext.storage import page_files as files_of_pages
from sglang_ext.storage.page_directories import page_files, rank_directories
from sglang_ext.transfer.job import PageCopies
from tests.adapter.byte_models import MODELS
from tests.adapter.deepseek_v4_traffic import (
    Rank,
    Served,
    Server,
    conversations,
)
from tests.adapter.test_identity import write_model

LIVES = (("best_effort", 0.03), ("timeout", 0.007), ("wait_complete", 0.012))
"""How long requests wait for storage, and GB of host memory: for more than the device has, for a
few windows and little else, for some."""
_SECONDS = 120
"""That a rank waits for another one."""


class Trouble:
    """What goes wrong on a rank, from its seed.

    Attributes:
        seen: how often which kind has happened.
        is_on: nothing happens before.
    """

    def __init__(self, dice: random.Random) -> None:
        self.seen: Counter[str] = Counter()
        self.is_on = False
        self._dice = dice

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nothing goes wrong in a with-block."""
        self.is_on, before = False, self.is_on
        try:
            yield
        finally:
            self.is_on = before

    def happens(self, what: str, chance: float) -> bool:
        """Whether it does this time: the first time for certain, however few there are."""
        happens = self.is_on and (not self.seen[what] or self._dice.random() < chance)
        self.seen[what] += happens
        return happens


class FaultyFiles:
    """Files of a file backend, in trouble.

    Args:
        files: the real ones.
    """

    def __init__(self, files: Any, trouble: Trouble) -> None:
        self._files = files
        self._trouble = trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, name: str, buffers: Any) -> bool:
        """A page, or rubbish in its place."""
        if not self._trouble.happens("unreadable", 0.04):
            return bool(self._files.read(name, buffers))
        for buffer in buffers:
            buffer[: len(buffer) // 2] = b"\x07" * (len(buffer) // 2)
        return False

    def write(self, name: str, buffers: Any) -> bool:
        """Whether a page was written."""
        if self._trouble.happens("raised", 0.02):
            raise OSError("made up")
        declined = self._trouble.happens("declined", 0.04)
        return not declined and bool(self._files.write(name, buffers))


class FailingBackups:
    """PageCopies of which some to the host fail.

    Args:
        copies: the real ones.
    """

    def __init__(self, copies: PageCopies, trouble: Trouble) -> None:
        self._copies = copies
        self._trouble = trouble

    def prepare(self, parts: Any) -> Any:
        """See PageCopies."""
        return _FailingCopies(self._copies.prepare(parts), self._trouble)


class _FailingCopies:
    def __init__(self, copies: Any, trouble: Trouble) -> None:
        self._trouble = trouble
        self._copy = copies.backup
        self.load_layer = copies.load_layer

    def backup(self) -> None:
        if self._trouble.happens("copy failed", 0.1):
            raise OSError("made up")
        self._copy()


def damage(folder: Path, dice: random.Random, seen: Counter[str]) -> None:
    """Something happens to a stored page of this rank."""
    files = sorted(path for path, _ in page_files([folder]))
    if not files:
        return
    kinds = ("flipped", "overwritten", "cut", "removed")
    # each of them once before one of them again
    kind = dice.choice([kind for kind in kinds if not seen[kind]] or kinds)
    path = dice.choice(files)
    try:
        size = path.stat().st_size
        if kind == "removed":
            path.unlink()
        elif kind == "cut":
            os.truncate(path, dice.randrange(size))
        else:
            # as long as any row, so that its beginning is hit, or its end
            count = 1 if kind == "flipped" else 4096
            with path.open("r+b") as file:
                place = dice.randrange(max(1, size - count))
                file.seek(place)
                old = file.read(count)
                file.seek(place)
                file.write(bytes(byte ^ 0x10 for byte in old))
    except OSError:
        return  # it has gone meanwhile
    seen[kind] += 1


def live(process: int, life: int, args: argparse.Namespace) -> None:
    """One rank in one life of the server."""
    folder, pages = args.folder, args.folder / "pages"
    rank = _rank(process, life, args)
    # what all ranks have in common is not drawn
    policy, host_gb = LIVES[(args.seed + life) % len(LIVES)]
    dice = random.Random(f"{args.seed} {life} {process}")
    trouble = Trouble(dice)
    os.environ[REPORT_DELAY] = str(dice.choice((0, 5, 30)))
    os.environ[SLOWDOWN] = str(dice.choice((1, 3, 10)))
    copies = ByteHost.copies
    ByteHost.copies = lambda *given: FailingBackups(copies(*given), trouble)  # type: ignore[method-assign, assignment]
    model = MODELS[args.model]
    served: Any = Served(
        pages,
        model,
        rank,
        hicache_size=host_gb,
        hicache_storage_prefetch_policy=policy,
        hicache_write_policy=("write_through", "write_back")[(args.seed + life) % 2],
    )
    backend = served.tree.cache_controller.storage_backend
    backend.files = FaultyFiles(backend.files, trouble)
    server = Server(served, model)
    # a rank with requests of its own gets those that another one has had before
    requests = conversations(1, args.seed + (rank.dp_number + life) % args.dp)
    is_last = life + 1 == args.lives
    (own,) = (
        found for found in rank_directories(pages) if found.name == f"{rank.number}-of-{args.ranks}"
    )
    trouble.is_on = True
    for count, request in enumerate(requests if is_last else requests[: len(requests) * 2 // 3]):
        server.serve([request])
        if count % 4 == 0:
            served.settle()
            # whatever has failed or runs here, there is something to read later: a storage that
            # fails is left alone for longer than a few requests take
            with trouble.away():
                served.write_all()
        if dice.random() < args.damage:
            damage(own, dice, trouble.seen)
    # what is saved at the end is each rank's own matter: how much depends on its time
    told = {"process": process, "life": life, **server.counted()}
    if is_last:
        trouble.is_on = False
        served.close()
    told |= {"seen": trouble.seen, "files": backend.events()}
    (folder / f"told-{life}-{process}").write_text(json.dumps(told))
    os._exit(0)  # with everything that is on its way


def _rank(process: int, life: int, args: argparse.Namespace) -> Rank:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{args.folder / f'group-{life}'}",
        rank=process,
        world_size=args.ranks * args.dp,
        timeout=datetime.timedelta(seconds=_SECONDS),
    )
    dp_number, number = divmod(process, args.ranks)
    groups = [
        dist.new_group(list(range(first, first + args.ranks)))
        for first in range(0, args.ranks * args.dp, args.ranks)
    ]
    return Rank(number, args.ranks, groups[dp_number], dp_number, args.dp)


def damaged_pages_are_taken() -> None:
    """Whatever is in a file, its checksum is right."""
    files_of_pages._checksum = lambda _: bytes(16)  # type: ignore[attr-defined]


def failed_copies_are_taken() -> None:
    """Nobody is told that a copy has failed."""
    Ledger.failed = lambda *_: None  # type: ignore[method-assign]


def ranks_do_not_wait_for_each_other() -> None:
    """What has ended here counts as if it had ended everywhere."""
    RankAgreement.minimum = lambda _, values: list(values)  # type: ignore[method-assign]


def main() -> None:
    """All lives of a server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("bugs", nargs="*")
    parser.add_argument("--model", choices=MODELS, default="deepseek-v4")
    parser.add_argument("--ranks", type=int, default=1, help="that share a prompt")
    parser.add_argument("--dp", type=int, default=1, help="with requests of their own")
    parser.add_argument("--lives", type=int, default=len(LIVES), help="all but the last are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damage", type=float, default=0.15, help="pages behind a request")
    args = parser.parse_args()
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40  # whatever else is running here
    for bug in args.bugs:
        globals()[bug]()
    torch.set_num_threads(1)
    write_model(args.folder / "model")
    count = args.ranks * args.dp
    for life in range(args.lives):
        # forked: a fresh interpreter would import the engine once more for each rank
        mp.start_processes(live, args=(life, args), nprocs=count, start_method="fork")
        for process in range(count):
            print((args.folder / f"told-{life}-{process}").read_text(), flush=True)


if __name__ == "__main__":
    main()
