"""What subscribers are told: replayed, it is the table, after any traffic."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from sglang.srt.disaggregation.kv_events import KVEventBatch
from sglang.srt.mem_cache.events import KVCacheEventRecorder, KvEventLoraNames
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ext.adapter import kv_events
from sglang_ext.adapter.block_hashes import BlockHashes, Namings, prepare
from sglang_ext.adapter.kv_events import KvEvents
from sglang_ext.core.compiled.constants import FREE, PAD
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.changes import Changes
from sglang_ext.core.table.columns import SlotColumn
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import STORED, PageTable
from sglang_ext.errors import StartupError
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.simulation import Simulation
from sglang_ext.testing.sizes import Sizes
from tests.fixtures.kv_view import DISK, EXTERNAL, GPU, ON_HOST, KvView

Patch = pytest.MonkeyPatch
SEEDS, STEPS = 24, 400
FIRST = (49,)
"""Seeds that find what few others do."""


class Followed:
    """A simulated engine, and a subscriber that replays what it is told."""

    def __init__(
        self,
        engine: SimEngine,
        names: KvEventLoraNames | None = None,
        *,
        dynamo_format: bool = False,
        pairs: bool = False,
    ) -> None:
        self.engine, self.pairs = engine, pairs
        self.view = KvView()
        self.known: dict[tuple[bytes, bytes], list[bytes]] = {}
        namings = Namings(
            names or KvEventLoraNames(), dynamo_format=dynamo_format, pairs=self.pairs
        )
        self.storage: str | None = "file"
        self.events = KvEvents(engine.index, namings, lambda: self.storage)
        reset = engine.reset

        def reset_and_tell() -> None:
            reset()
            self.events.cleared()

        engine.reset = reset_and_tell  # type: ignore[method-assign]

    def take(self) -> list[dict[str, Any]]:
        """Events, replayed."""
        events = [msgspec.to_builtins(event) for event in self.events.take()]
        self.view.apply(events)
        return events

    def check(self) -> None:
        """Replay what has happened, and compare."""
        self.take()
        table = self.engine.index.table
        on_device, on_host, in_storage = set(), set(), set()
        for leaf in np.flatnonzero((table.parent != FREE) & (table.children == 0)).tolist():
            path = table.path(leaf)
            blocks = self.blocks_of(table, path)
            ready = table.device.ready[path]
            reach = len(path) if ready.all() else int(ready.argmin())
            on_device |= {block for page in blocks[:reach] for block in page}
            for there, where in ((table.host.ready, on_host), (table.stored == STORED, in_storage)):
                where |= {block for at in np.flatnonzero(there[path]) for block in blocks[at]}
        assert self.view.at(GPU) == on_device, "the device is another"
        assert self.view.at(ON_HOST) == on_host, "the host is another"
        assert self.view.at(DISK) == in_storage, "storage is another"

    def blocks_of(self, table: PageTable, path: NDArray[np.int64]) -> list[list[int]]:
        """Hashes of the engine's pages of each row, by their definition."""
        key: Any = table.namespace(path)
        digest, size = b"", table.geometry.device_page
        if isinstance(key, tuple) and key[1] is not None:
            digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + key[1].encode()).digest()
        blocks: list[list[int]] = []
        for row in path.tolist():
            tokens = table.tokens[row]
            real, width = tokens[tokens != PAD], 1 + self.pairs
            # of each position its token, or that and the one behind it
            stop = len(real) - table.geometry.overlap
            positions = [real[at : at + width] for at in range(stop)]
            whole = np.array(positions).reshape(-1, size * width)
            known = digest, tokens.tobytes()
            if known not in self.known:
                self.known[known] = []
                for page in whole:
                    digest = hashlib.sha256(digest + page.astype("<u4").tobytes()).digest()
                    self.known[known].append(digest)
            digest = self.known[known][-1]
            blocks.append([int.from_bytes(d[:8], "big", signed=True) for d in self.known[known]])
        return blocks


def replay(
    seed: int, steps: int = STEPS, *, pairs: bool = False, **kind: Any
) -> tuple[Simulation, Followed]:
    """Seeded traffic with a subscriber, whose view is compared after every step."""
    simulation = Simulation(seed, **kind)
    followed = Followed(simulation.engine, pairs=pairs)
    weights = [weight for weight, _ in simulation.actions]
    actions = [action for _, action in simulation.actions]
    for action in simulation.rng.choices(actions, weights, k=steps):
        action()
        # what is told at once is one operation, or many
        if simulation.dice.random() < (0.9, 0.3, 0.05)[seed % 3]:
            followed.check()
    followed.check()
    return simulation, followed


@pytest.mark.parametrize(
    "kind", [{}, {"storage": True}, {"overlap": 1}, {"overlap": 1, "pairs": True}], ids=str
)
def test_the_view_of_a_subscriber_is_the_table_after_any_traffic(kind: dict[str, Any]) -> None:
    stored, sizes, cleared = set(), set(), 0
    for seed in (*FIRST, *range(SEEDS)):
        simulation, followed = replay(seed, **kind)
        stored |= {medium for medium, blocks in followed.view.blocks.items() if blocks}
        sizes.add(simulation.engine.geometry.device_page)
        cleared += followed.view.cleared - 1
    assert stored == {GPU, ON_HOST, *([DISK] if "storage" in kind else [])}
    assert sizes == ({16, 32} if "storage" in kind else {1, 2, 16, 32})
    assert cleared > 0, "nothing was flushed"


def host_copies_that_go_are_not_noted(patch: Patch) -> None:
    drop, note, quiet = HostSpace.drop, Changes.note, []

    def drop_quietly(self: HostSpace, rows: Any) -> None:
        quiet.append(True)
        drop(self, rows)
        quiet.pop()

    def note_unless_quiet(self: Changes, rows: Any) -> None:
        if not quiet:
            note(self, rows)

    patch.setattr(HostSpace, "drop", drop_quietly)
    patch.setattr(Changes, "note", note_unless_quiet)


def loads_that_end_are_not_noted(patch: Patch) -> None:
    def make_ready(self: SlotColumn, rows: Any) -> None:
        self.ready[rows] = True

    patch.setattr(SlotColumn, "make_ready", make_ready)


def what_is_noted_late_is_lost(patch: Patch) -> None:
    take = Changes.take
    patch.setattr(Changes, "take", lambda self: take(self)[-1:])


def a_row_is_taken_for_the_page_that_it_was(patch: Patch) -> None:
    patch.setattr(BlockHashes, "are_known", lambda self, rows: self.counts[rows] > 0)


def pages_in_common_go_with_the_first_row(patch: Patch) -> None:
    class Once(Counter):  # type: ignore[type-arg]
        def __setitem__(self, page: int, rows: int) -> None:
            super().__setitem__(page, min(rows, 1))

    patch.setattr(kv_events, "Counter", Once)


def copies_are_told_before_they_can_be_read(patch: Patch) -> None:
    patch.setattr(kv_events, "readable", lambda column: lambda rows: column.present[rows])


def pages_are_told_before_those_in_front_of_them(patch: Patch) -> None:
    medium = kv_events.Medium
    patch.setattr(kv_events, "Medium", lambda *of, in_order: medium(*of, in_order=False))


def pages_in_storage_stay_behind_those_that_are_gone(patch: Patch) -> None:
    patch.setattr(kv_events.Medium, "_orphans", lambda self, rows, parent: iter(()))


def pages_go_from_the_front(patch: Patch) -> None:
    removed = kv_events.Medium.removed

    def reversed_(self: Any) -> Any:
        events = removed(self)
        for event in events:
            event.block_hashes.reverse()
        return events

    patch.setattr(kv_events.Medium, "removed", reversed_)


def a_page_in_storage_is_told_after_it_has_left_the_table(patch: Patch) -> None:
    patch.setattr(kv_events, "FREE", 0)


def a_flush_is_not_told(patch: Patch) -> None:
    cleared, begun = KvEvents.cleared, set()

    def once(self: KvEvents) -> None:
        if self not in begun:
            begun.add(self)
            cleared(self)

    patch.setattr(KvEvents, "cleared", once)


BUGS: list[Callable[[Patch], None]] = [
    host_copies_that_go_are_not_noted,
    loads_that_end_are_not_noted,
    what_is_noted_late_is_lost,
    a_row_is_taken_for_the_page_that_it_was,
    pages_in_common_go_with_the_first_row,
    copies_are_told_before_they_can_be_read,
    pages_are_told_before_those_in_front_of_them,
    pages_in_storage_stay_behind_those_that_are_gone,
    pages_go_from_the_front,
    a_page_in_storage_is_told_after_it_has_left_the_table,
    a_flush_is_not_told,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):  # noqa: PT012
        for seed in (*FIRST, *range(SEEDS)):
            replay(seed, storage="storage" in bug.__name__)


# ---- beside the engine's own recorder --------------------------------------------------------

LORA = "a" * 32
NAMESPACES = [None, (None, "salt"), ("tenant", None), ("tenant", "salt"), (LORA, None)]


class Recorded:
    """What the engine's own recorder says of nodes of its tree, each below the one before."""

    def __init__(
        self, namespace: Any, page: int, names: KvEventLoraNames, *, pairs: bool, **how: bool
    ) -> None:
        self.pairs = pairs
        self.recorder = KVCacheEventRecorder(enabled=True, page_size=page, lora_names=names, **how)
        self.namespace = namespace or (None, None)
        self.last = self.node(np.empty(0, dtype=np.int64), parent=None)
        self.last.hash_value = []

    def node(self, tokens: NDArray[np.int64], parent: Any) -> Any:
        extra_key, salt = self.namespace
        raw = array("q", tokens.tolist())
        key = RadixKey(raw, extra_key, is_bigram=self.pairs, cache_salt=salt)
        return SimpleNamespace(key=key, parent=parent, hash_value=None, event_hash_value=None)

    def stored(self, tokens: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Events of the next node."""
        self.last = self.node(tokens, self.last)
        self.recorder.record_store(self.last)
        return [msgspec.to_builtins(event) for event in self.recorder.take()]


def engine_of(page: int, overlap: int = 0) -> SimEngine:
    return SimEngine(Geometry(page, 32, overlap=overlap), Sizes(64, 64, 64, 64, low_share=1000))


def prompt(pages: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 1000, pages * 16)


def run_until_idle(engine: SimEngine) -> None:
    for _ in range(20):
        engine.pass_time(10.0)
        engine.ledger.commit(engine.report())
        engine.commit_storage(engine.storage_report())


def serve(engine: SimEngine, tokens: NDArray[np.int64], namespace: Any = None) -> None:
    request = engine.start(tokens, namespace)
    engine.compute(request, len(tokens))
    engine.finish(request)


@pytest.mark.parametrize("dynamo_format", [False, True])
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(("overlap", "pairs"), [(0, False), (1, False), (1, True)])
def test_events_are_those_of_the_engines_recorder(
    page: int, namespace: Any, dynamo_format: bool, overlap: int, pairs: bool
) -> None:
    names = KvEventLoraNames()
    if namespace and namespace[0] == LORA:
        names.register(SimpleNamespace(lora_id=LORA, extra_key=LORA), "adapter")
    theirs = Recorded(namespace, page, names, pairs=pairs, dynamo_format=dynamo_format)
    engine = engine_of(page, overlap)
    followed = Followed(engine, names, dynamo_format=dynamo_format, pairs=pairs)
    assert followed.take() == [{"type": "AllBlocksCleared"}]
    tokens = np.random.default_rng(page).integers(0, 1 << 33, 4 * 64 + 5)
    serve(engine, tokens[:150], namespace)
    known, end = ((count - overlap) // page * page for count in (150, len(tokens)))
    assert followed.take() == theirs.stored(tokens[: known + pairs])
    serve(engine, tokens, namespace)
    assert followed.take() == theirs.stored(tokens[known : end + pairs])


def test_whoever_reads_with_the_engines_type_cannot_read_pairs() -> None:
    """As with the engine's own cache; a router must take both (``docs/operations.md``)."""
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    for overlap in (0, 1):
        engine = engine_of(16, overlap)
        followed = Followed(engine, pairs=bool(overlap))
        serve(engine, prompt(4))
        sent = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=followed.events.take()))
        if not overlap:
            assert len(decoder.decode(sent).events) == 2
            continue
        with pytest.raises(msgspec.ValidationError, match=r"Expected `int`, got `array`"):
            decoder.decode(sent)


# ---- what is told when -------------------------------------------------------------------------


def test_a_copy_is_told_when_it_can_be_read_and_not_before() -> None:
    engine = engine_of(16)
    followed = Followed(engine)
    serve(engine, prompt(4))
    followed.check()
    assert len(followed.view.at(GPU)) == 4
    assert followed.view.at(ON_HOST) == set(), "its backup is in flight"
    engine.settle()
    followed.check()
    assert followed.view.at(ON_HOST) == followed.view.at(GPU)
    engine.index.evict_device(4, 4)
    followed.check()
    assert (len(followed.view.at(GPU)), len(followed.view.at(ON_HOST))) == (0, 4)
    request = engine.start(prompt(4))
    assert followed.take() == [], "its load is in flight"
    engine.compute(request, 1)
    engine.commit(TransferKind.LOAD)
    assert [event["medium"] for event in followed.take()] == [GPU]
    engine.finish(request)
    followed.check()


def test_pages_behind_a_load_are_told_after_it() -> None:
    engine = engine_of(16)
    followed = Followed(engine)
    serve(engine, prompt(4))
    engine.settle()
    engine.index.evict_device(4, 4)
    followed.check()
    request = engine.start(np.concatenate((prompt(4), prompt(3, seed=1))))
    engine.compute(request, 16 * 2)
    assert followed.take() == [], "they have no beginning yet"
    engine.settle()
    (event,) = [event for event in followed.take() if event["medium"] == GPU]
    assert len(event["block_hashes"]) == 6
    assert event["parent_block_hash"] is None


def test_what_comes_and_goes_between_two_steps_is_not_told() -> None:
    engine = engine_of(16)
    followed = Followed(engine)
    serve(engine, prompt(4))
    engine.settle()
    followed.check()
    engine.index.evict_device(4, 4)
    serve(engine, prompt(4))
    engine.settle()
    assert followed.take() == []


def test_a_page_that_two_tenants_have_goes_with_the_last_of_them() -> None:
    engine = engine_of(16)
    followed = Followed(engine)
    for tenant in ("one", "other"):
        serve(engine, prompt(4), (tenant, None))
    events = followed.take()
    assert [len(event.get("block_hashes", ())) for event in events] == [0, 4]
    engine.settle()
    engine.index.evict_device(4, 4)
    assert [event["medium"] for event in followed.take()] == [ON_HOST]
    engine.index.evict_device(4, 4)
    (event,) = followed.take()
    assert (event["type"], event["medium"], len(event["block_hashes"])) == ("BlockRemoved", GPU, 4)


def test_storage_is_told_by_its_kind_as_long_as_it_is_attached() -> None:
    sizes = Sizes(64, 64, 64, 64, low_share=1000, storage_threshold=1)
    engine = SimEngine(Geometry(16, 32), sizes)
    followed = Followed(engine)
    serve(engine, prompt(4))
    run_until_idle(engine)
    followed.check()
    assert len(followed.view.at(DISK)) == 4
    engine.index.detach_storage()
    followed.storage = None
    followed.check()
    assert followed.view.at(DISK) == set()
    engine.index.attach_storage(sizes.storage_limits(64))
    followed.storage = "mooncake"
    run_until_idle(engine)
    followed.take()
    assert followed.view.at(EXTERNAL) == followed.view.at(GPU)
    assert followed.view.at(DISK) == set()


def test_what_is_noted_is_bounded_where_nobody_looks() -> None:
    engine = engine_of(16)
    changes = Changes(engine.index.table)
    for _ in range(100):
        serve(engine, prompt(40))
        engine.index.evict_device(64, 64)
    assert len(changes.take()) <= engine.index.table.capacity
    assert len(changes.take()) == 0


def test_a_server_without_the_engines_hash_does_not_start(monkeypatch: Patch) -> None:
    def fail(*of: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("sglang_ext.adapter.block_hashes.get_hash_str", fail)
    with pytest.raises(StartupError, match=r"--kv-events-config .* no compiler"):
        prepare()
