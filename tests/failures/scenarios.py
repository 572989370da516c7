"""What the scenarios of the failure catalogue have in common."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.adapter.admission import Admission
from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.plan import PrefixMatch
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.digest import Pages
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import SimRequest
from tests.core.test_index import PAGE, engine_with, prompt, serve

__all__ = [
    "ALL",
    "PAGE",
    "Tokens",
    "check_all",
    "copies",
    "engine_with",
    "find",
    "join",
    "pages_of",
    "prompt",
    "rows_of",
    "run",
    "serve",
    "serve_and_settle",
]

Tokens = NDArray[np.int64]
ALL = 10_000
"""More pages than any scenario has."""
ROOMY = Admission(pool=1 << 30, window=32, page=1, chunk=None)
"""An engine that admits anything."""


def pages_of(tokens: Tokens, page: int = PAGE) -> Pages:
    """The whole pages of a prompt, without the token that is left to compute."""
    count = (len(tokens) - 1) // page
    return tokens[: count * page].reshape(count, page)


def join(*prompts: Tokens) -> Tokens:
    """One prompt: the whole pages of each, and the last token of the last."""
    *heads, tail = prompts
    return np.concatenate([*(head[:-1] for head in heads), tail])


def rows_of(engine: SimEngine, tokens: Tokens) -> Rows:
    """Rows that the table has for a prompt, whether it can resume there or not."""
    return engine.index.table.lookup(pages_of(tokens, engine.geometry.page_tokens), None)


def find(engine: SimEngine, tokens: Tokens) -> PrefixMatch:
    """Where a prompt could resume now."""
    return engine.index.match(pages_of(tokens, engine.geometry.page_tokens), None)


def run(engine: SimEngine, tokens: Tokens, chunk: int = ALL, *, settle: bool = False) -> SimRequest:
    """A request that has computed its whole prompt and goes on running.

    Args:
        chunk: tokens of each step.
        settle: all copies end after each step.
    """
    request = engine.start(tokens)
    while not request.done:
        engine.compute(request, chunk)
        if settle:
            engine.demote()
            engine.settle()
    return request


def serve_and_settle(engine: SimEngine, *prompts: Tokens) -> None:
    """Requests one after another; every copy they start has ended."""
    for tokens in prompts:
        serve(engine, tokens)
        engine.settle()


def copies(engine: SimEngine) -> dict[str, SlotColumn]:
    """The four columns by name."""
    table = engine.index.table
    names = ("device", "host", "swa_device", "swa_host")
    return {name: getattr(table, name) for name in names}


def check_all(engine: SimEngine, *, idle: bool = False) -> None:
    """Invariants, locks, slots and contents."""
    engine.check()
    engine.check_every_slot()
    assert (engine.index.table.parent != FREE).sum() == engine.index.table.n_rows
    if idle:
        engine.settle()
        engine.check_idle()
