"""Depth-first order of waiting requests, for ``--schedule-policy dfs-weight``."""

from collections import Counter
from collections.abc import Sequence

from sglang_ext.core.table.columns import Rows


def heaviest_first(paths: Sequence[Rows]) -> list[int]:
    """Positions of ``paths`` in depth-first order of the tree they span.

    At a branch the subtree with most requests comes first, and a request whose
    path ends at a page comes after those that go deeper, as in the engine's order.
    """
    weight: Counter[int] = Counter()
    listed = [path.tolist() for path in paths]
    for path in listed:
        weight.update(path)
    end = (1, 0)  # sorts after every (-weight, row)

    def key(position: int) -> list[tuple[int, int]]:
        return [(-weight[row], row) for row in listed[position]] + [end]

    return sorted(range(len(listed)), key=key)
