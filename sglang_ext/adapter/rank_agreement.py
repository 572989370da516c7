"""Agreement of the tensor-parallel ranks on what has ended."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class RankAgreement:
    """Element-wise minimum over a process group (a CPU group, or None for one rank)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        alone = group is None or dist.get_world_size(group) == 1
        self._group = None if alone else group

    def minimum(self, values: Sequence[int]) -> list[int]:
        """The smallest of each value over all ranks.

        A collective: every rank calls it exactly once a scheduler step, whether it
        has anything to report or not.
        """
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group)
        return [int(value) for value in tensor]
