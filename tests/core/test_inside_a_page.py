"""Device pages of one token: prefixes are found to the token, inside pages of the table."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.compiled.loop_sets import COMPILED
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import FREE, PageTable
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing import definitions
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.sizes import Sizes

PAGE, WINDOW = 16, 40
Tokens = NDArray[np.int64]


def engine_with(device_page: int = 1, **sizes: Any) -> SimEngine:
    """Small device pages; nothing is copied to the host unless a test says so."""
    defaults: dict[str, Any] = {
        "device_pages": 40,
        "device_window_pages": 40,
        "low_share": 1000,
        "pinned_share": 1,
    }
    return SimEngine(Geometry(device_page, WINDOW), Sizes(**{**defaults, **sizes}))


def words(count: int, seed: int = 0) -> Tokens:
    """So many tokens."""
    return np.random.default_rng(seed).integers(0, 1000, count)


def run(engine: SimEngine, tokens: Tokens) -> int:
    """A request from start to finish; returns how many of its tokens were found.

    Every pass checks, slot by slot, that it reads the KV of its own prefix.
    """
    request = engine.start(tokens)
    found = request.computed
    while not request.done:
        engine.compute(request, 24)
    engine.finish(request)
    engine.check()
    engine.check_every_slot()
    return found


def tails(engine: SimEngine) -> int:
    """Tails in the table."""
    table = engine.index.table
    return int(((table.parent != FREE) & (table.tokens[:, -1] == PAD)).sum())


@pytest.mark.parametrize("length", [3, 16, 17, 31, 77, 100])
def test_the_end_of_a_conversation_is_found_to_the_token(length: int) -> None:
    engine = engine_with()
    conversation = words(length)
    run(engine, conversation)
    # one token is left to compute where the same comes again
    assert run(engine, conversation) == length - 1
    assert run(engine, np.append(conversation, 7)) == length
    assert run(engine, np.append(conversation, words(30, 1))) >= length


@pytest.mark.parametrize("cut", [1, 15, 16, 18, 47, 60, 79])
def test_who_branches_off_inside_a_page_resumes_there(cut: int) -> None:
    engine = engine_with(device_pages=100, device_window_pages=100)
    shared = words(80)
    run(engine, shared)
    for seed in range(1, 5):
        # each of them makes a page of its own, which begins as the first one
        assert run(engine, np.append(shared[:cut], words(40, seed) + 1000)) == cut
    assert run(engine, np.append(shared[:cut], [5000])) == cut


@pytest.mark.parametrize("device_page", [2, 4, 8])
def test_a_match_ends_with_a_whole_device_page(device_page: int) -> None:
    engine = engine_with(device_page)
    shared = words(75)
    run(engine, shared)
    whole = 75 // device_page * device_page
    assert run(engine, np.append(shared, words(9, 1) + 1000)) == whole
    assert (
        run(engine, np.append(shared[:43], words(9, 2) + 1000)) == 43 // device_page * device_page
    )


def test_a_conversation_goes_on_in_its_tail_and_copies_nothing() -> None:
    engine = engine_with()
    conversation = words(21)
    run(engine, conversation)
    for turn in range(1, 8):
        length = len(conversation)
        conversation = np.append(conversation, words(11, turn))
        assert run(engine, conversation) == length
        assert tails(engine) == (len(conversation) % PAGE > 0)
    assert engine.index.counters.copied_inside == 0


def test_two_that_go_on_in_one_tail_have_a_page_each() -> None:
    engine = engine_with()
    start = words(40)
    run(engine, start)
    one, other = (np.append(start, words(30, seed) + 1000 * seed) for seed in (1, 2))
    requests = [engine.start(tokens) for tokens in (one, other)]
    assert [request.computed for request in requests] == [40, 40]
    for request in requests:
        engine.compute(request, 30)
        engine.check()
    for request in requests:
        engine.finish(request)
        engine.check_every_slot()
    assert engine.index.counters.copied_inside == 1
    for tokens in (one, other):
        assert run(engine, np.append(tokens, 7)) == 70
    assert engine.index.table.n_rows == 2 + 2 * 3


def test_a_prompt_that_ends_inside_a_tail_leaves_it_as_it_is() -> None:
    engine = engine_with()
    conversation = words(44)
    run(engine, conversation)
    rows = engine.index.table.n_rows
    assert run(engine, conversation[:41]) == 40
    assert run(engine, conversation) == 43
    assert engine.index.table.n_rows == rows


def test_without_room_there_is_no_tail_and_no_error() -> None:
    engine = engine_with(device_pages=3, device_window_pages=3)
    holder = engine.start(words(2 * PAGE, 9) + 5000)
    engine.compute(holder, 1000)
    assert run(engine, words(10)) == 0
    assert tails(engine) == 0
    engine.finish(holder)
    assert run(engine, words(10)) == 0
    assert run(engine, words(10)) == 9


def test_without_room_for_a_page_of_its_own_a_request_goes_on_without_one() -> None:
    engine = engine_with(device_pages=5, device_window_pages=5)
    shared = words(48)
    run(engine, shared)
    first = engine.start(np.append(shared[:40], words(8, 1) + 1000))
    second = engine.start(np.append(shared[:40], words(8, 2) + 2000))
    assert first.computed == second.computed == 40
    engine.compute(first, 8, checkpoint=False)
    engine.compute(second, 8, checkpoint=False)
    blocker = engine.start(words(PAGE, 3) + 3000)
    engine.compute(blocker, PAGE, checkpoint=False)
    engine.finish(first)
    assert "no room for a page of its own" in engine.seen
    engine.check()
    engine.check_every_slot()
    engine.abort(blocker)
    engine.finish(second)
    assert run(engine, np.append(second.tokens, 7)) == 48
    engine.check_idle()


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_the_host_keeps_tails_and_pages_that_are_resumed_inside(policy: WritePolicy) -> None:
    engine = engine_with(
        host_pages=60, host_window_pages=60, write=policy, low_share=1, checkpoint_pages=2
    )
    conversation = words(75)
    for _ in range(2):  # the selective policy copies what two requests had
        run(engine, conversation)
        engine.settle()
    for _ in range(8):
        engine.demote()
        engine.settle()
    for tokens, found in (
        (np.append(conversation, words(9, 1)), 75),
        (np.append(conversation[:70], words(9, 2) + 1000), 70),
    ):
        engine.index.evict_device(99, 99)
        assert engine.index.table.device.n_present == 0
        assert run(engine, tokens) == found
        engine.settle()
        for _ in range(4):
            engine.demote()
            engine.settle()
    engine.check_idle()


def test_a_tail_is_not_written_to_storage_and_the_boundary_before_it_is() -> None:
    engine = engine_with(host_pages=60, host_window_pages=60)
    engine.index.attach_storage(StorageLimits.for_host(10_000, 1, 1))
    run(engine, words(5 * PAGE + 7))
    engine.settle()
    persists = engine.index.persists.begin(0)
    table, kept = engine.index.table, engine.index.kept
    assert sum(len(persist.full) for persist in persists) == 5
    assert all((table.tokens[persist.full_rows.rows] != PAD).all() for persist in persists)
    # a window that ends with a whole page is there: from that a restarted server goes on
    path = persists[-1].path.rows
    assert kept.ends[path[-1]]
    written = np.concatenate([persist.window_rows.rows for persist in persists])
    assert np.isin(engine.index.window_of(path), written).all()


def test_pages_of_sixteen_tokens_are_as_before() -> None:
    engine = engine_with(16)
    run(engine, words(75))
    assert not engine.geometry.resumes_inside
    assert tails(engine) == 0
    assert run(engine, np.append(words(75), 7)) == 64
    assert engine.geometry.window_pages == -(-WINDOW // PAGE)


ALPHABET = st.lists(st.integers(0, 2), min_size=1, max_size=PAGE)


@given(st.lists(st.tuples(st.integers(0, 3), ALPHABET, st.booleans()), max_size=60))
def test_the_search_among_siblings_finds_most_in_common(
    steps: list[tuple[int, list[int], bool]],
) -> None:
    """The search, compiled and interpreted, its definition, and all siblings one by one."""
    geometry = Geometry(1, WINDOW)
    tables = [PageTable(geometry, 64, loops=loops) for loops in (COMPILED, INTERPRETED)]
    known: dict[tuple[int, bytes], int] = {}
    for table in tables:
        for namespace in range(4):
            root = table.namespaces.root_of(namespace)
            table.namespaces.note_first_page(root)  # they stay
    for namespace, tokens, remove in steps:
        page = np.full(PAGE, PAD)
        page[: len(tokens)] = tokens
        key = namespace, page.tobytes()
        siblings = [np.frombuffer(k[1], np.int64) for k in known if k[0] == namespace]
        most = max((common(sibling, page) for sibling in siblings), default=0)
        found = []
        for table in tables:
            root = table.root(namespace)
            assert root is not None
            found.append(table.inside(root, page, usable=False))
            found.append(definitions.inside(table, root, page.tolist(), usable=False))
        assert len(set(found)) == 1
        assert found[0][1] == most
        if key in known and remove:
            for table in tables:
                table.remove_rows(np.array([known[key]]))
            del known[key]
        elif key not in known:
            rows = [
                table.add_rows(np.empty(0, np.int64), page[None], namespace) for table in tables
            ]
            assert rows[0] == rows[1]
            known[key] = int(rows[0][0])


def common(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with."""
    same = (one == other) & (one != PAD)
    return len(same) if same.all() else int(same.argmin())
