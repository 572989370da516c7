"""How many tokens a byte of host memory caches, against the split of the engine's own host tier.

That one gives each component a pool in the proportion of the device pools, so a token takes its
full-attention KV and, with the default ratio, 0.8 of its sliding-window KV.
"""

import math

import numpy as np
import pytest

from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.window import checkpoint_pages
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.planning.model import PRESETS, ModelShape
from sglang_ext.sizing.replay import Budget, Replay

PAGE, PROMPT, ANSWER = 64, 12_000, 300
STEP = 60
"""Pages."""
STOCK_SWA_SHARE = 0.8
NARROW = 512
GOALS = [("gpt-oss-120b", 1.7), ("gemma-4-31b", 3.0)]


def stock_tokens_per_byte(model: ModelShape) -> float:
    return 1 / (model.full_token_bytes + STOCK_SWA_SHARE * model.swa_token_bytes)


@pytest.mark.parametrize(("name", "goal"), GOALS)
def test_the_simulator_caches_more_tokens_in_the_same_bytes(name: str, goal: float) -> None:
    """Conversations, far more than the host holds: which of them can be resumed from there?"""
    model, rng = PRESETS[name], np.random.default_rng(1)
    host = int(12 * PROMPT / stock_tokens_per_byte(model))
    pages = 8 * PROMPT // PAGE
    cache = Replay(model, Budget(pages, pages, host), WritePolicy.WRITE_THROUGH, PAGE)
    served = []
    for _ in range(100):
        served.append(rng.integers(0, 1 << 17, PROMPT + ANSWER))
        cache.serve(served[-1][:PROMPT], served[-1][PROMPT:])
    for _ in range(0, pages, STEP):  # others take the device, and what is next is copied
        assert cache._allocate(STEP) is not None
        for plan in cache.index.demote_ahead():
            cache.index.commit_backup(plan.op, ok=True)
    assert cache.index.table.device.n_present == 0
    resumable = 0
    for history in served:
        pages = history[: len(history) // PAGE * PAGE].reshape(-1, PAGE)
        match = cache.index.match(pages, None)
        resumable += len(match.rows) * PAGE
    assert resumable / host >= goal * stock_tokens_per_byte(model)


@pytest.mark.parametrize(("name", "goal"), GOALS)
def test_so_do_real_bytes(name: str, goal: float) -> None:
    """The same layers with narrow heads: pages and windows taken from an allocation until it
    has no more, each written and read again."""
    model = PRESETS[name]
    narrow = ModelShape(
        model.full_layers,
        model.swa_layers,
        window=model.window,
        kv_heads=1,
        head_dim=model.head_dim * model.kv_heads // NARROW,
        swa_kv_heads=1,
        swa_head_dim=(model.swa_head_dim or model.head_dim)
        * (model.swa_kv_heads or model.kv_heads)
        // NARROW,
    )
    geometry = narrow.geometry(PAGE)
    sizes = [
        (size * PAGE // 2, size * PAGE // 2)
        for size in (narrow.full_token_bytes, narrow.swa_token_bytes)
    ]
    budget = int(40 * PROMPT / stock_tokens_per_byte(narrow))
    memory = ArenaMemory(shape_for(budget, tuple(sizes), geometry.slots_per_page), pin=False)
    arena, interval = memory.arena, checkpoint_pages(geometry, sizes, None)
    assert sum(arena.shape.plane_bytes) <= budget
    length = PROMPT // PAGE
    windows = math.ceil(length / interval) * geometry.window_pages
    taken: list[tuple[int, np.ndarray]] = []
    conversations = 0
    while True:
        pages = arena.allocate(0, length), arena.allocate(1, windows)
        if pages[0] is None or pages[1] is None:
            break
        conversations += 1
        taken += [(0, pages[0]), (1, pages[1])]
    data = memory._bytes.numpy()
    for number, (component, pages) in enumerate(taken):
        for at in spans(memory, component, pages, sizes[component]):
            data[at] = number % 251
    for number, (component, pages) in enumerate(taken):
        for at in spans(memory, component, pages, sizes[component]):
            assert (data[at] == number % 251).all()
    assert conversations * length * PAGE / budget >= goal * stock_tokens_per_byte(narrow)


def spans(
    memory: ArenaMemory, component: int, pages: np.ndarray, sizes: tuple[int, int]
) -> list[slice]:
    """Bytes of pages in both planes of a memory."""
    found, start = [], 0
    for plane, size in enumerate(sizes):
        found += [slice(start + p * size, start + (p + 1) * size) for p in pages.tolist()]
        start += memory.arena.shape.plane_bytes[plane]
    return found
