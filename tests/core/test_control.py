"""Pins and drops: what stays, what goes, and what they cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.control.drops import Dropped, Drops
from sglang_ext.core.control.pins import Pins
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import pages_of
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.simulation import Simulation
from sglang_ext.testing.sizes import Sizes

PAGE, WINDOW = 16, 16
Patch = pytest.MonkeyPatch


def prompt(seed: int, pages: int = 6) -> Any:
    """Tokens of whole pages."""
    return np.random.default_rng(seed).integers(0, 1 << 40, pages * PAGE)


def engine(**sizes: Any) -> SimEngine:
    """A rank with 24 pages on the device and 48 on the host."""
    given = {"write": WritePolicy.WRITE_BACK, "low_share": 100, **sizes}
    return SimEngine(Geometry(PAGE, WINDOW), Sizes(24, 24, 48, 48, **given))


def serve(rank: SimEngine, tokens: Any, namespace: object = None) -> None:
    """A request, from its beginning to its end."""
    request = rank.start(tokens, namespace)
    rank.compute(request, len(tokens))
    rank.finish(request)


def pin(index: PrefixCache, rank: SimEngine, tokens: Any, namespace: object = None) -> Rows:
    """Pin a prompt, with the copies that it takes; its path."""
    pages = pages_of(tokens, len(tokens) // PAGE, index.geometry)
    path = index.match(pages, namespace).rows
    index.pins.add(path, len(pages))
    rank.submit(index.pins.copy(int(path[-1])))
    rank.settle()
    return path


def drop(index: PrefixCache, tokens: Any, namespace: object = None) -> Dropped:
    """Drop a prompt."""
    pages = pages_of(tokens, len(tokens) // PAGE, index.geometry)
    return index.drops.prompt(pages, namespace, tokens[len(pages) * PAGE :])


def found(index: PrefixCache, tokens: Any, namespace: object = None) -> int:
    """Pages that a request would find."""
    pages = pages_of(tokens, len(tokens) // PAGE, index.geometry)
    return len(index.match(pages, namespace).rows)


def test_what_goes_on_from_a_pin_leaves_like_others() -> None:
    """Its window may have pages of the one that is pinned: those stay, it does not. Short
    questions to a pinned prompt would fill the host for good."""
    rank = SimEngine(Geometry(PAGE, 3 * PAGE), Sizes(24, 24, 48, 48, low_share=100))
    index, whole = rank.index, prompt(1, pages=7)
    serve(rank, whole)
    path = pin(index, rank, whole[: 6 * PAGE])
    longer = index.match(pages_of(whole, 7, index.geometry), None).rows
    rank.submit(index.backups.begin(longer, make_room=True))
    rank.settle()
    index.evict_device(99, 99)
    assert found(index, whole) == len(longer) == len(path) + 1
    rank.press_host(99, 99)
    assert found(index, whole) == len(path)
    rank.check()


def test_what_is_pinned_is_copied_and_stays() -> None:
    rank = engine()
    index = rank.index
    serve(rank, prompt(1))
    serve(rank, prompt(2))
    path = pin(index, rank, prompt(1))
    assert index.pins.is_whole(int(path[-1]))
    assert index.pins.rows.tolist() == sorted(path.tolist())
    rank.press_host(99, 99)
    index.evict_device(99, 99)
    assert found(index, prompt(1)) == len(path)
    assert found(index, prompt(2)) == 0
    rank.check()
    index.pins.remove(int(path[-1]))
    rank.press_host(99, 99)
    assert found(index, prompt(1)) == 0
    rank.check_idle()


def test_pins_do_not_take_more_than_their_share() -> None:
    rank = engine()
    index = rank.index
    for seed in (1, 2):
        serve(rank, prompt(seed))
    # 6 of 48 pages and 1 of 48 windows are 0.146 of the host, twice that is more than a quarter
    first = pin(index, rank, prompt(1))
    pages = pages_of(prompt(2), 6, index.geometry)
    assert not index.pins.fits(index.match(pages, None).rows)
    assert index.pins.fits(first), "what is pinned already takes no more"


def test_a_pin_that_loses_its_pages_is_told() -> None:
    rank = engine()
    index = rank.index
    serve(rank, prompt(1))
    path = index.match(pages_of(prompt(1), 6, index.geometry), None).rows
    index.pins.add(path, 6)
    index.evict_device(99, 99)
    assert not index.pins.is_there(int(path[-1]))
    index.pins.remove(int(path[-1]))
    rank.check_idle()


def test_pins_that_are_worth_nothing_are_looked_at_once() -> None:
    """Whoever makes room must not go through all that is pinned each time."""
    rank = engine()
    index = rank.index
    serve(rank, prompt(1))
    end = int(pin(index, rank, prompt(1))[-1])
    tails = index.residency.candidates.look_at_tails()
    assert end in tails.places
    assert next(tails.rising(float("inf"), []), None) is None


def test_a_drop_leaves_what_others_share() -> None:
    rank = engine()
    index = rank.index
    shared = prompt(1, 3)
    one, other = (np.concatenate((shared, prompt(seed, 3))) for seed in (2, 3))
    serve(rank, one)
    serve(rank, other)
    serve(rank, np.concatenate((one, prompt(4, 2))))
    assert drop(index, one) == (5, 0)
    assert found(index, other) == 6
    assert drop(index, shared) == (6, 0)
    assert index.table.n_rows == 0
    rank.check_idle()


def test_a_drop_stops_at_what_is_pinned_for_itself() -> None:
    rank = engine()
    index = rank.index
    serve(rank, prompt(1, 3))
    longer = np.concatenate((prompt(1, 3), prompt(2, 3)))
    serve(rank, longer)
    pinned = pin(index, rank, prompt(1, 3))
    assert drop(index, longer) == (3, 0)
    assert found(index, longer) == len(pinned)
    assert drop(index, prompt(1, 3)) == (3, 0)
    assert index.pins.ends == []
    rank.check_idle()


def test_a_part_of_a_page_tells_prompts_apart() -> None:
    rank = engine()
    index = rank.index
    one, other = (np.concatenate((prompt(1, 2), prompt(seed, 2))) for seed in (2, 3))
    serve(rank, one)
    serve(rank, other)
    assert drop(index, one[: 2 * PAGE + 5]) == (2, 0)
    assert found(index, other) == 4


def test_a_drop_of_a_namespace_leaves_the_others() -> None:
    rank = engine()
    index = rank.index
    for namespace in ("a", "b", None):
        serve(rank, prompt(1), namespace)
        serve(rank, prompt(2, 2), namespace)
    assert index.drops.namespace("a") == (8, 0)
    assert index.drops.namespace("a") == (0, 0)
    assert [found(index, prompt(1), namespace) for namespace in ("a", "b", None)] == [0, 6, 6]


def test_pages_of_a_running_request_stay() -> None:
    rank = engine()
    index = rank.index
    serve(rank, np.concatenate((prompt(1), prompt(2, 2))))
    request = rank.start(prompt(1))
    held = len(request.path)
    assert drop(index, prompt(1)) == (8 - held, held)
    rank.compute(request, 99)
    rank.finish(request)
    assert drop(index, prompt(1)) == (6, 0)
    rank.check_idle()


def test_a_backup_in_flight_is_given_up() -> None:
    rank = engine(write=WritePolicy.WRITE_THROUGH)
    index = rank.index
    serve(rank, prompt(1))
    assert drop(index, prompt(1)) == (6, 0)
    rank.settle()
    assert rank.host.used == rank.host_window.used == 0
    rank.check_idle()


def test_without_a_host_a_drop_is_all_there_is() -> None:
    rank = SimEngine(Geometry(PAGE, WINDOW), Sizes(24, 24))
    serve(rank, prompt(1))
    path = rank.index.match(pages_of(prompt(1), 6, rank.geometry), None).rows
    assert not rank.index.pins.fits(path)
    assert drop(rank.index, prompt(1)) == (6, 0)
    rank.check_idle()


def test_what_is_below_a_page_is_what_hangs_on_it() -> None:
    """By definition, after traffic with all namespaces in one table."""
    simulation = Simulation(4, operator=True)
    simulation.run(400)
    serve(simulation.engine, prompt(1), "x")
    table = simulation.engine.index.table
    used = np.flatnonzero(table.parent != FREE).tolist()
    roots = {table.root(namespace) for namespace in (None, ("lora", None), "x")} - {None}
    for parent in (*used, *roots):
        below = {
            row
            for row in used
            if parent in (*table.path(row)[:-1], table.parent[table.path(row)[0]])
        }
        assert set(table.below(parent).tolist()) == below


# ---- ranks, beside the model, and bugs that are seeded ------------------------------------

SEEDS, STEPS = 60, 400
FIRST = (40, 1, 26, 20)


def traffic(seeds: Any) -> set[str]:
    """What happened in all seeds together; a failing one is in the traceback."""
    seen: set[str] = set()
    for seed in seeds:
        has_storage = seed % 3 == 0
        simulation = Simulation(
            seed,
            ranks=1 + seed % 2,
            modelled=not has_storage,
            storage=has_storage,
            overlap=int(seed % 7 == 0),
            operator=True,
        )
        simulation.run(STEPS)
        seen |= simulation.engine.seen
    return seen


def test_ranks_agree_with_pins_and_drops_in_the_traffic(full: bool) -> None:
    wanted = {"pin", "pin with a copy", "pin given up", "unpin", "too much to pin", "drop"}
    assert {*wanted, "drop with pages held"} <= traffic(range(30 if full else 12))


def test_ranks_agree_with_what_is_learned() -> None:
    for seed in range(6):
        Simulation(seed, 2, eviction="learned", storage=seed % 3 == 0, operator=True).run(STEPS)


def a_pin_is_forgotten(patch: Patch) -> None:
    original = Pins.add

    def add(self: Pins, path: Rows, asked: int) -> None:
        original(self, path, asked)
        self._table.host.unlock(path)
        self._table.swa_host.unlock(self._residency.window_of(path))

    patch.setattr(Pins, "add", add)
    patch.setattr(Pins, "remove", lambda self, end: self._pins.pop(end))


def a_pin_keeps_no_window(patch: Patch) -> None:
    original = Pins.add

    def add(self: Pins, path: Rows, asked: int) -> None:
        original(self, path, asked)
        pin = self._pins[int(path[-1])]
        self._table.swa_host.unlock(pin.window.rows)
        self._pins[int(path[-1])] = pin._replace(window=self._held(path[:0]))

    patch.setattr(Pins, "add", add)


def an_unpinned_page_stays_locked(patch: Patch) -> None:
    original = Pins.remove

    def remove(self: Pins, end: int) -> None:
        rows = self._pins[end].path.rows
        original(self, end)
        self._table.host.lock(rows[self._table.parent[rows] != FREE][:1])

    patch.setattr(Pins, "remove", remove)


def a_drop_leaves_a_page_behind(patch: Patch) -> None:
    original = PageTable.below
    patch.setattr(PageTable, "below", lambda self, parent: original(self, parent)[:-1])


def a_drop_stops_at_the_prompt(patch: Patch) -> None:
    patch.setattr(Drops, "_going_on", lambda self, parent, rest: np.empty(0, dtype=np.int64))


def a_drop_takes_what_others_share(patch: Patch) -> None:
    original = Drops._going_on
    patch.setattr(Drops, "_going_on", lambda self, parent, rest: original(self, parent, rest[:0]))


def a_drop_waits_for_no_backup(patch: Patch) -> None:
    def _drop(self: Drops, rows: Rows) -> Dropped:
        self._pins.forget(rows)
        held = self._table.device.locks[rows] > 0
        self._residency.drop(np.sort(rows[~held]))
        return Dropped(int((~held).sum()), int(held.sum()))

    patch.setattr(Drops, "_drop", _drop)


def a_drop_forgets_no_pin(patch: Patch) -> None:
    patch.setattr(Pins, "forget", lambda self, rows: None)


BUGS = [
    a_pin_is_forgotten,
    a_pin_keeps_no_window,
    an_unpinned_page_stays_locked,
    a_drop_leaves_a_page_behind,
    a_drop_stops_at_the_prompt,
    a_drop_takes_what_others_share,
    a_drop_waits_for_no_backup,
    a_drop_forgets_no_pin,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        traffic((*FIRST, *range(SEEDS)))
