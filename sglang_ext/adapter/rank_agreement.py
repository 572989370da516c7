"""Agreement of the ranks that share a prompt on what has ended."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class RankAgreement:
    """Element-wise minimum over process groups.

    Args:
        groups: CPU groups, in an order that is the same on every rank. The minimum
            over one after the other is the minimum over their product: tensor
            parallel, and attention context parallel, ranks. None is skipped.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup | None]) -> None:
        self._groups = [g for g in groups if g is not None and dist.get_world_size(g) > 1]

    def minimum(self, values: Sequence[int]) -> list[int]:
        """The smallest of each value over all ranks.

        A collective: every rank calls it exactly once a scheduler step, whether it
        has anything to report or not.
        """
        if not self._groups:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        for group in self._groups:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
        return [int(value) for value in tensor]
