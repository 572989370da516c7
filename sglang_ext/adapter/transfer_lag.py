"""How long transfers take from their decision to their end, as the scheduler sees it."""

import time
from collections import deque

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.plan import TransferKind

_MOST_LAGS = 256


class TransferLag:
    """Looks, once a step, at which transfers have ended."""

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        self._begun: dict[TransferKind, dict[int, float]] = {kind: {} for kind in TransferKind}
        self._lags: deque[tuple[TransferKind, float]] = deque(maxlen=_MOST_LAGS)

    def begun(self, kind: TransferKind, op: int) -> None:
        """A transfer has begun."""
        self._begun[kind][op] = time.perf_counter()

    def look(self) -> None:
        """Transfers of a kind end in their order."""
        for kind, begun in self._begun.items():
            if begun:
                pending = self._index.pending[kind]
                while begun and (first := next(iter(begun))) not in pending:
                    self._lags.append((kind, time.perf_counter() - begun.pop(first)))

    def take(self) -> list[tuple[TransferKind, float]]:
        """(kind, seconds) of those that have ended since the last call."""
        return [self._lags.popleft() for _ in range(len(self._lags))]
