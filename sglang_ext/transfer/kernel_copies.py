"""Copies of a transfer by the kernels of this project."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_ext.kernels.page_copy.plane import Copier
from sglang_ext.transfer.job import Part, PreparedCopies


class KernelCopies:
    """PageCopies (see ``job``) by a kernel of this project."""

    def __init__(self, copier: Copier, pools: int) -> None:
        self._copier = copier
        self._pools = pools

    def prepare(self, parts: Sequence[Part]) -> PreparedCopies:
        """See PageCopies."""
        none = np.empty(0, dtype=np.int64)
        pairs = [(none, none)] * self._pools
        for part in parts:
            pairs[part.pool] = (part.host, part.device)
        busy = {part.pool for part in parts}
        return _KernelJob(self._copier, self._copier.prepare(pairs), busy)


class _KernelJob:
    """PreparedCopies of a kernel."""

    def __init__(self, copier: Copier, job: Any, busy: set[int]) -> None:
        self._copier = copier
        self._job = job
        self._busy = busy

    def backup(self) -> None:
        self._copier.copy_all(self._job, to_host=True)

    def load_layer(self, pool: int, layer: int) -> None:
        if pool not in self._busy:
            return
        layers = range(layer, layer + 1)
        self._copier.copy_layers(self._job, pool, layers, to_host=False)
