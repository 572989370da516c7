"""Pages that are named by the token behind them as well: a draft's KV at a position is of it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import pages_of
from sglang_ext.testing import engine, requests
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.shared_memory import SharedSlots, SimSharedMemory
from sglang_ext.testing.simulation import Simulation
from sglang_ext.testing.sizes import Sizes

PAGE, WINDOW = 16, 40
FIRST = (78, 66, 56, 52)
"""Seeds in which the host makes room by moving pages."""
Tokens = NDArray[np.int64]
Patch = pytest.MonkeyPatch


def engine_with(device_page: int) -> SimEngine:
    geometry = Geometry(device_page, WINDOW, overlap=1)
    return SimEngine(geometry, Sizes(60, 60, low_share=1000, pinned_share=1))


def words(count: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 1000, count)


def run(sim: SimEngine, tokens: Tokens) -> int:
    """A request from start to finish; returns how many of its positions were found. Every pass
    checks, slot by slot, that it reads the KV of its own tokens and of those behind them."""
    request = sim.start(tokens)
    found = request.computed
    while not request.done:
        sim.compute(request, 24)
    sim.finish(request)
    sim.check()
    sim.check_every_slot()
    return found


@pytest.mark.parametrize("length", [3, 16, 17, 18, 31, 77, 100])
def test_a_conversation_is_found_to_the_position_before_its_last(length: int) -> None:
    sim = engine_with(1)
    conversation = words(length)
    run(sim, conversation)
    # the last token is left to compute, and the position before it is of that token
    assert run(sim, conversation) == length - 2
    assert run(sim, np.append(conversation, 7)) == length - 1
    assert run(sim, np.append(conversation, words(30, 1))) >= length - 1


@pytest.mark.parametrize("cut", [1, 2, 15, 16, 17, 18, 47, 60, 79])
def test_who_branches_off_shares_what_is_of_common_tokens(cut: int) -> None:
    sim = engine_with(1)
    shared = words(80)
    run(sim, shared)
    for seed in range(1, 5):
        assert run(sim, np.append(shared[:cut], words(40, seed) + 1000)) == cut - 1


@pytest.mark.parametrize("device_page", [4, 16, 32])
def test_the_token_behind_a_page_decides_whose_it_is(device_page: int) -> None:
    sim = engine_with(device_page)
    size = sim.geometry.device_page
    first = words(4 * size + 1)
    run(sim, first)
    other = first.copy()
    other[3 * size] += 1  # it follows the third page
    assert run(sim, np.append(other, 7)) == 2 * size
    assert run(sim, np.append(first, 7)) == 4 * size


@pytest.mark.parametrize("device_page", [1, 16])
def test_a_prompt_is_whole_pages_with_the_token_behind_them(device_page: int) -> None:
    sim = engine_with(device_page)
    conversation = words(3 * PAGE)
    run(sim, conversation)
    assert sim.index.table.device.n_present == 3 - (device_page == PAGE)


def test_seeded_traffic_finds_no_contradiction(full: bool) -> None:
    reached: set[str] = set()
    for seed in range(16 if full else 6):
        for storage in (False, True):
            simulation = Simulation(
                seed, 1 + seed % 2, modelled=seed % 3 == 0, storage=storage, overlap=1
            )
            simulation.run(400)
            reached |= simulation.engine.seen
    assert {"load", "tail", "resumed inside", "persist", "prefetch"} <= reached


def pages_forget_the_token_behind(patch: Patch) -> None:
    def without(*args: Any) -> NDArray[np.int64]:
        names = pages_of(*args).copy()
        names[:, -1] = 0
        return names

    for user in (requests, engine):
        patch.setattr(user, "pages_of", without)


def a_match_inside_a_page_counts_the_token_behind(patch: Patch) -> None:
    inside_of = INTERPRETED.paths.inside_of

    def inside(c: Any, *args: Any) -> tuple[int, int]:
        row, shared = inside_of(c, *args)
        return row, min(shared + c.overlap, c.weights.size - c.overlap) if row >= 0 else 0

    patch.setattr(INTERPRETED.paths, "inside_of", inside)


def without_drafts(patch: Patch, owner: Any, name: str) -> None:
    """What a call writes to the memory that is shared, without the plane of the draft."""
    call = getattr(owner, name)

    def without(self: Any, *args: Any) -> None:
        memory = self if isinstance(self, SimSharedMemory) else self.memory
        before = memory.content[1].copy()
        call(self, *args)
        memory.content[1][:] = before

    patch.setattr(owner, name, without)


def a_draft_stays_behind_when_its_page_moves(patch: Patch) -> None:
    without_drafts(patch, SimSharedMemory, "move")


def a_draft_is_not_copied(patch: Patch) -> None:
    without_drafts(patch, SharedSlots, "put")


def run_all_seeds() -> None:
    for seed in (*FIRST, *range(40)):
        Simulation(seed, modelled=seed % 3 == 0, overlap=1, loops=(INTERPRETED,)).run(400)


BUGS = [
    pages_forget_the_token_behind,
    a_match_inside_a_page_counts_the_token_behind,
    a_draft_stays_behind_when_its_page_moves,
    a_draft_is_not_copied,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_found(bug: Any, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        run_all_seeds()
