"""Loads and prefetches are spans of the requests that wait for them."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.observability.trace import TraceNullContext, TraceSliceContext

from sglang_ext.adapter import request_spans
from sglang_ext.adapter.request_spans import RequestSpans
from sglang_ext.core.plan import TransferKind

Spans = list[tuple[str, int, int, int]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(ns=100)
    monkeypatch.setattr(request_spans, "time", SimpleNamespace(time_ns=lambda: now.ns))
    return now


class Index:
    """Loads in flight."""

    def __init__(self) -> None:
        self.pending: dict[TransferKind, dict[int, None]] = {TransferKind.LOAD: {}}

    def last_op(self, kind: TransferKind) -> int:
        return max(self.pending[kind])


def request(name: str, spans: Spans | None) -> Any:
    """A request, with a trace that notes spans or without one."""

    def trace_slice(span: TraceSliceContext) -> None:
        assert spans is not None and span.attrs is not None and span.end_time_ns is not None
        tokens = span.attrs["tokens"]
        spans.append((span.slice_name, span.start_time_ns, span.end_time_ns, tokens))

    trace: Any = SimpleNamespace(tracing_enable=True, trace_slice=trace_slice)
    if spans is None:
        trace = TraceNullContext()
    stats = SimpleNamespace(trace_ctx=trace)
    return SimpleNamespace(cache_request_handle=name, time_stats=stats)


def test_a_load_is_a_span_from_its_decision_to_its_end(clock: SimpleNamespace) -> None:
    index: Any = Index()
    spans = RequestSpans(index)
    loads = index.pending[TransferKind.LOAD]
    first: Spans = []
    second: Spans = []
    for op, trace in enumerate((first, None, second)):
        loads[op] = None
        spans.load_begun(request(str(op), trace), 16 * (op + 1))
        clock.ns += 10
    spans.look()
    assert first == []
    del loads[0], loads[1]
    spans.look()
    assert first == [("kv_load_from_host", 100, 130, 16)]
    assert second == []
    del loads[2]
    clock.ns += 10
    spans.look()
    spans.look()
    assert second == [("kv_load_from_host", 120, 140, 48)]


def test_a_prefetch_is_a_span_from_the_lookup_to_the_match_that_follows(
    clock: SimpleNamespace,
) -> None:
    index: Any = Index()
    spans = RequestSpans(index)
    traced: Spans = []
    gone: Spans = []
    for name in ("traced", "untraced", "gone"):
        spans.prefetch_begun(name)
    clock.ns += 50
    spans.matched(request("traced", traced))
    assert traced == [], "it still waits"
    for name in ("traced", "untraced", "gone", "never waited"):
        spans.prefetch_ended(name, 64)
    spans.forget("gone")
    clock.ns += 50
    for name, trace in (("traced", traced), ("untraced", None), ("gone", gone)):
        spans.matched(request(name, trace))
    spans.matched(request("traced", traced))
    assert traced == [("kv_prefetch_from_storage", 100, 150, 64)]
    assert gone == []
