"""What a request waits for, as spans of the engine's traces (``--enable-trace``)."""

import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.plan import TransferKind

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

LOAD, PREFETCH = "kv_load_from_host", "kv_prefetch_from_storage"
_LEVEL = 1
"""Of detail: what the engine's own stages of a prefill have."""


class RequestSpans:
    """Adds a span to the trace of a request when its load, or its prefetch, has ended. Requests
    without a trace cost a look at whether they have one."""

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        # of loads: the trace, when it began, and the tokens
        self._loading: dict[int, tuple[Any, int, int]] = {}
        self._prefetching: dict[Hashable, int] = {}
        # of prefetches that have ended: when they began and ended, and the tokens
        self._prefetched: dict[Hashable, tuple[int, int, int]] = {}

    def load_begun(self, req: "Req", tokens: int) -> None:
        """The load that has just begun is that of a request."""
        trace = req.time_stats.trace_ctx
        if trace.tracing_enable:
            op = self._index.last_op(TransferKind.LOAD)
            self._loading[op] = (trace, time.time_ns(), tokens)

    def look(self) -> None:
        """Once a step: which loads have ended."""
        pending = self._index.pending[TransferKind.LOAD]
        while self._loading and (op := next(iter(self._loading))) not in pending:
            trace, begun, tokens = self._loading.pop(op)
            _add(trace, LOAD, begun, time.time_ns(), tokens)

    def prefetch_begun(self, handle: Hashable) -> None:
        """A request begins to wait for storage."""
        self._prefetching[handle] = time.time_ns()

    def prefetch_ended(self, handle: Hashable, tokens: int) -> None:
        """It need not wait any longer, and is matched next."""
        begun = self._prefetching.pop(handle, None)
        if begun is not None:
            self._prefetched[handle] = begun, time.time_ns(), tokens

    def matched(self, req: "Req") -> None:
        """A request is matched."""
        ended = self._prefetched.pop(req.cache_request_handle, None)
        if ended is not None and req.time_stats.trace_ctx.tracing_enable:
            _add(req.time_stats.trace_ctx, PREFETCH, *ended)

    def forget(self, handle: Hashable) -> None:
        """A request has gone."""
        self._prefetching.pop(handle, None)
        self._prefetched.pop(handle, None)


def _add(trace: Any, name: str, begun: int, ended: int, tokens: int) -> None:
    """Add a span; times in nanoseconds since 1970."""
    from sglang.srt.observability.trace import TraceSliceContext

    trace.trace_slice(
        TraceSliceContext(
            slice_name=name,
            start_time_ns=begun,
            end_time_ns=ended,
            level=_LEVEL,
            attrs={"tokens": tokens},
        )
    )
