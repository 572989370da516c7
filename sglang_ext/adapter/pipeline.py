"""Pipeline stages: each has a cache of its own layers, and all of them hold the same table.

A stage gets what arrives from the stage before it, and forms the batches for itself. What it finds
in its cache decides on them, so the tables must not differ by a page. A stage is behind the one
before it, and that one must not wait for it: each waits for what the other sends later. So the
first stage decides, and the others follow.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

_TAG = 0x5EED
"""Of these messages; the engine sends others in the same group."""
_MOST_ON_THEIR_WAY = 64
"""Steps that a stage may be ahead of the next one; the engine lets it be less."""
_SECONDS_BEHIND = 60.0
_A_MOMENT = 0.0002


def refuse_unlike(params: "CacheInitParams", sizes: Sequence[int]) -> None:
    """Check that the stages have room for equally many pages. A collective.

    Args:
        sizes: what the tables depend on, of this rank.

    Raises:
        StartupError: a stage has others; on all of them.
    """
    stages = RankAgreement([params.pp_cache_group])
    both = stages.minimum([*sizes, *(-size for size in sizes)])
    least, most = both[: len(sizes)], [-size for size in both[len(sizes) :]]
    if least != most:
        raise StartupError(
            f"--pp-size {params.pp_size}: the stages have unlike layers, and room for {least} to "
            f"{most} pages or bytes of them; use a --pp-size that gives each stage as many "
            f"sliding-window and full-attention layers, --tp-size, or {OWN_CACHE}"
        )


class Stages:
    """What has ended on the first stage, as every other stage commits it.

    Args:
        group: CPU group of the ranks that have the same part of all stages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._stage = dist.get_rank(group)
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def follow(
        self, report: list[int], mark: int, look_again: Callable[[], list[int]]
    ) -> list[int]:
        """What to commit in this step; once a step, on every rank.

        Args:
            report: what has ended on this stage: its first two numbers are operations, the others
                say of each of the next ones whether it is good.
            mark: of the table, the same on all stages.
            look_again: a later report of this stage.

        Raises:
            RuntimeError: this stage does not get as far as the first one, or something has failed
                here alone.
        """
        if self._stage > 0:
            told = torch.zeros(len(report) + 1, dtype=torch.int64)
            dist.recv(told, self._ranks[self._stage - 1], group=self._group, tag=_TAG)
            *wanted, other = told.tolist()
            assert mark == other, "stages hold different tables"
            report = _wait_for(wanted, report, look_again)
        if self._stage + 1 < len(self._ranks):
            self._pass_on(torch.tensor([*report, mark], dtype=torch.int64))
        return report

    def _pass_on(self, told: torch.Tensor) -> None:
        work = dist.isend(told, self._ranks[self._stage + 1], group=self._group, tag=_TAG)
        assert work is not None
        self._sent.append((work, told))
        if len(self._sent) > _MOST_ON_THEIR_WAY:
            self._sent.popleft()[0].wait()


def _wait_for(
    wanted: list[int], report: list[int], look_again: Callable[[], list[int]]
) -> list[int]:
    deadline = time.monotonic() + _SECONDS_BEHIND
    while report[0] < wanted[0] or report[1] < wanted[1]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"transfers are {_SECONDS_BEHIND:.0f} s behind those of stage 0")
        time.sleep(_A_MOMENT)
        report = look_again()
    if any(here < there for here, there in zip(report[2:], wanted[2:], strict=True)):
        raise RuntimeError("a backup has failed on this stage, and not on the first one")
    return wanted
