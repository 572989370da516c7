"""What becomes of a storage when the weights change, call by call of the engine."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.adapter import weight_updates
from sglang_ext.adapter.served_weights import ServedWeights
from sglang_ext.adapter.storage_front import StorageFront
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.core.storage.plan import StorageLimits
from tests.adapter.test_identity import LARGE, same, tensors, write_model, write_tensors
from tests.core.storage_ranks import rank

LIMITS = StorageLimits(threshold_pages=1, stop_pages=16, prefetch_pages=40, persist_pages=8)


class Background:
    """A storage with nothing to do."""

    def drain(self, timeout_s: float) -> bool:
        return True

    def poll(self, ledger: object) -> None:
        """Nothing has ended."""

    def close(self) -> None:
        """Nothing to release."""


class Setup:
    """Opens storages and remembers whose."""

    def __init__(self, index: Any, root: Path) -> None:
        self.opened: list[bytes] = []
        self.removed: list[bytes] = []
        self.weights = ServedWeights(root, same)
        self._index = index

    def identity(self) -> bytes:
        return self.weights.digest()

    def open(self, name: str, extra: str | None, policy: str, own: bytes) -> Any:
        self.opened.append(own)
        patience = Patience(policy, 1.0, 1.0)
        backend = SimpleNamespace(remove=lambda: self.removed.append(own))
        return StorageTier(self._index, Background(), LIMITS, patience), backend  # type: ignore[arg-type]


class Controller:
    """What storage calls need of the controller."""

    storage_backend: Any = None
    storage_backend_type: str | None = None

    def all_ranks(self, done: bool) -> bool:
        return done

    def submit_backups(self) -> None:
        """Nothing is queued."""

    def attach_storage(self, storage: Any, name: str, backend: Any) -> None:
        self.storage_backend, self.storage_backend_type = backend, name

    def detach_storage(self) -> None:
        self.storage_backend = self.storage_backend_type = None


class Cache:
    """The part of the cache that follows the weights."""

    in_flight = False

    def __init__(self, root: Path) -> None:
        self.index = rank().index
        self.index.detach_storage()
        self.setup = Setup(self.index, root)
        self.storage = StorageFront(self.index, lambda: self.holds_nothing)
        self.cache_controller = Controller()
        self.storage.use(self.cache_controller, self.setup)  # type: ignore[arg-type]
        self.resets = 0
        self.pages = 3
        self.storage.open("file", None, "wait_complete", "model")

    @property
    def holds_nothing(self) -> bool:
        return self.pages == 0

    def settle(self, *, give_up: bool) -> None:
        assert not give_up, "what is written of the old weights is theirs"

    def reset(self) -> None:
        self.pages = 0
        self.resets += 1
        self.storage.follow_weights()

    @property
    def opened(self) -> list[bytes]:
        return self.setup.opened

    @property
    def is_used(self) -> bool:
        assert self.storage.tier is not None
        return not self.storage.tier.is_suspended


class Updater:
    """The engine's updater, as far as hooks see it."""

    tp_cpu_group = None

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.flushes = 0
        self.idle = True
        self._session: object | None = None

    def flush_cache(self) -> bool:
        self.flushes += 1
        if self.idle:
            self.cache.reset()
        return self.idle


class Engine:
    """Calls of the engine through the hooks.

    Attributes:
        seen: whether storage was used while the weights were written.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.updater = Updater(cache)
        self.seen: list[bool] = []

    def call(self, hook: Any, *, writes: bool = True, success: bool = True, **fields: Any) -> Any:
        request = SimpleNamespace(
            **{"flush_cache": True, "load_format": "auto", "action": "checksum", **fields}
        )

        def original(updater: Updater, request: Any) -> Any:
            self.seen.append(self.cache.is_used)
            if writes:
                weight_updates.note_load()
            if success and request.flush_cache:
                updater.flush_cache()
            return SimpleNamespace(success=success, message="")

        return hook(original, self.updater, request)

    def session(self, **fields: Any) -> None:
        def begin(updater: Updater, request: Any) -> Any:
            updater._session = object()
            return SimpleNamespace(success=True)

        def end(updater: Updater, request: Any) -> Any:
            updater._session = None
            return SimpleNamespace(success=True)

        weight_updates.session_begins(begin, self.updater, None)  # type: ignore[arg-type]
        self.call(weight_updates.part_of_session, **fields)
        weight_updates.session_ends(end, self.updater, None)  # type: ignore[arg-type]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / f"model {seed}", seed) for seed in range(2)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, models: list[Path]) -> Engine:
    from sglang.srt import runtime_context

    model = SimpleNamespace(revision=None, load_format="auto")
    monkeypatch.setattr(runtime_context, "get_model", lambda: model)
    monkeypatch.setattr(weight_updates, "cache_of", lambda updater: updater.cache)
    return Engine(Cache(models[0]))


def from_disk(engine: Engine, path: Path, **fields: Any) -> Any:
    return engine.call(weight_updates.from_disk, model_path=str(path), **fields)


def test_an_update_from_disk_goes_on_with_the_pages_of_those_weights(
    engine: Engine, models: list[Path]
) -> None:
    from_disk(engine, models[1])
    assert engine.seen == [False], "storage was used while the weights were written"
    assert engine.cache.is_used
    own = [ServedWeights(root, same).digest() for root in models]
    assert engine.cache.opened == own
    engine.cache.pages = 5
    from_disk(engine, models[0])
    assert engine.cache.opened == [*own, own[0]]


@pytest.mark.parametrize(
    "change", ["tensors", "ipc", "part of a checkpoint", "another format", "reset for a test"]
)
def test_weights_that_nobody_can_name_share_nothing(
    engine: Engine, models: list[Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    known = {ServedWeights(root, same).digest() for root in models}
    if change == "tensors":
        engine.session()
    elif change == "ipc":
        engine.call(weight_updates.from_processes)
    elif change == "part of a checkpoint":
        write_tensors(models[1] / "model.safetensors", {LARGE: tensors(1)[LARGE]})
        from_disk(engine, models[1])
    elif change == "another format":
        from_disk(engine, models[1], load_format="pt")
    else:
        engine.call(weight_updates.check, action="reset_tensors")
        engine.cache.reset()
    assert engine.seen == [False]
    assert engine.cache.is_used
    first, second = engine.cache.opened
    assert second not in {first, *known}


def test_pages_of_weights_that_nobody_can_name_do_not_pile_up(
    engine: Engine, models: list[Path]
) -> None:
    """A trainer changes the weights a thousand times."""
    for _ in range(3):
        engine.session()
    from_disk(engine, models[1])
    assert engine.cache.setup.removed == engine.cache.opened[1:4]


@pytest.mark.parametrize("hook", ["disk", "tensors"])
def test_without_a_flush_storage_waits_for_one(
    engine: Engine, models: list[Path], hook: str
) -> None:
    """The engine keeps what the old weights have computed, and mixes it with what comes."""
    if hook == "disk":
        from_disk(engine, models[1], flush_cache=False)
    else:
        engine.session(flush_cache=False)
    assert not engine.cache.is_used
    engine.cache.storage.detach()
    assert engine.cache.storage.attach("file", None, "m", "wait_complete")[0]
    assert not engine.cache.is_used, "a new storage is no way around it"
    engine.cache.reset()
    assert engine.cache.is_used
    assert engine.cache.opened[-1] != engine.cache.opened[0]


def test_a_flush_that_is_refused_is_none(engine: Engine, models: list[Path]) -> None:
    engine.updater.idle = False
    from_disk(engine, models[1])
    assert not engine.cache.is_used
    engine.cache.reset()
    assert engine.cache.is_used


def test_with_nothing_in_the_cache_no_flush_is_needed(engine: Engine, models: list[Path]) -> None:
    engine.cache.pages = 0
    from_disk(engine, models[1], flush_cache=False)
    assert engine.cache.is_used
    assert engine.cache.opened[-1] == ServedWeights(models[1], same).digest()


def test_an_update_that_wrote_nothing_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    from_disk(engine, tmp_path / "nowhere", writes=False, success=False)
    assert engine.cache.is_used
    assert len(engine.cache.opened) == 1
    assert engine.updater.flushes == 0


def test_what_fails_half_way_is_nobodys_and_drops_what_there_was(
    engine: Engine, models: list[Path]
) -> None:
    from_disk(engine, models[1], success=False)
    assert engine.updater.flushes == 1
    assert engine.cache.is_used
    known = {ServedWeights(root, same).digest() for root in models}
    assert engine.cache.opened[-1] not in known


def test_an_update_whose_way_back_fails_is_an_answer(
    engine: Engine, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine raises it, in the scheduler, which ends the server."""

    def original(updater: object, request: object) -> Any:
        weight_updates.note_load()
        raise RuntimeError("shapes differ")

    request = SimpleNamespace(model_path=str(models[1]), load_format="auto", flush_cache=True)
    answer = weight_updates.from_disk(original, engine.updater, request)  # type: ignore[arg-type]
    assert not answer.success
    assert "shapes differ" in answer.message
    known = {ServedWeights(root, same).digest() for root in models}
    assert engine.cache.opened[-1] not in known


def test_a_call_outside_of_a_session_is_refused_without_consequences(engine: Engine) -> None:
    engine.call(weight_updates.part_of_session, writes=False, success=False)
    assert engine.seen == [True]
    assert engine.cache.is_used
    assert engine.updater.flushes == 0


def test_storage_rests_as_long_as_a_session_is_open(engine: Engine) -> None:
    engine.updater._session = None

    def begin(updater: Updater, request: Any) -> Any:
        updater._session = object()
        return SimpleNamespace(success=True)

    weight_updates.session_begins(begin, engine.updater, None)  # type: ignore[arg-type]
    engine.cache.reset()
    assert not engine.cache.is_used


@pytest.mark.parametrize(
    ("saver", "backup", "what", "lost"),
    [
        (True, False, "resume_memory_occupation", True),
        (True, True, "resume_memory_occupation", False),
        (False, False, "resume_memory_occupation", False),
        (True, False, "release_memory_occupation", False),
    ],
)
def test_memory_of_weights_that_comes_back_empty(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    saver: bool,
    backup: bool,
    what: str,
    lost: bool,
) -> None:
    from sglang.srt import runtime_context

    features = SimpleNamespace(enable_memory_saver=saver, enable_weights_cpu_backup=backup)
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(features=features))
    weight_updates.memory_comes_or_goes(engine.updater, what)  # type: ignore[arg-type]
    assert engine.cache.is_used is not lost
    engine.cache.reset()
    assert (len(engine.cache.opened) == 2) is lost


@pytest.mark.parametrize("other", [{"success": 0}, {"flushed": 1}, {"changed": 1, "success": 0}])
def test_what_happens_on_one_rank_happens_on_all(
    engine: Engine, models: list[Path], monkeypatch: pytest.MonkeyPatch, other: dict[str, int]
) -> None:
    """The engine decides on each rank for itself whether an update was one, and flushes."""

    class Two:
        def __init__(self, groups: object) -> None:
            """One group of two ranks."""

        def minimum(self, own: Sequence[int]) -> list[int]:
            there = {"success": 1, "changed": 0, "flushed": 0, **other}
            theirs = (there["success"], -there["changed"], -there["flushed"])
            return [min(pair) for pair in zip(own, theirs, strict=True)]

    monkeypatch.setattr(weight_updates, "RankAgreement", Two)
    fails_here = "success" not in other
    from_disk(engine, models[1], success=not fails_here, writes=not fails_here)
    assert engine.updater.flushes == 1, "on all ranks, and once"
    known = {ServedWeights(root, same).digest() for root in models}
    if "success" in other:
        assert engine.cache.opened[-1] not in known
