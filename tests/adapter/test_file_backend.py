"""Pages in files behind the storage tier: what goes first, what never goes, what is said."""

import errno
import os
import shutil
import stat
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from sglang_ext.adapter.storage_front import StorageFront
from sglang_ext.errors import StartupError
from sglang_ext.storage import file_eviction
from tests.adapter.file_tier import FILE_BYTES, PAGE, WINDOW_PAGES, Rank, age, backend, keys
from tests.core.storage_ranks import tokens


def pages_in(directory: Path) -> list[Path]:
    """Files of pages."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("."))


def assert_no_holes(rank: Rank, prompts: list[np.ndarray]) -> None:
    """What is left of a prompt is its beginning."""
    for prompt in prompts:
        there = [rank.files.exists(key.hex()) for key in keys(prompt)]
        assert there == sorted(there, reverse=True), "a page is left without the one before"


# ---- what goes first ---------------------------------------------------------


def test_a_prompt_that_gives_way_keeps_its_beginning(tmp_path: Path) -> None:
    """A long prompt, then a short one for which there is no room: the end of the long one goes,
    and it can be resumed from a window before."""
    long, short = tokens(100), tokens(25, seed=7)
    rank = Rank(backend(tmp_path, max_size=150 * FILE_BYTES), checkpoint_pages=8)
    rank.serve(long)
    assert rank.resume(long) == rank.reach(long) == 100
    rank.serve(short)
    assert rank.resume(short) == 25
    assert rank.files.files.removed > 0
    assert rank.resume(long) >= 64, f"{rank.reach(long)} pages are left from the first one on"


def test_whatever_is_left_of_a_prompt_can_be_used(tmp_path: Path) -> None:
    """Page by page, to the last one: no page is left without those in front of it, nor a
    window without one of its pages or without what leads to it."""
    rank = Rank(backend(tmp_path, max_size="1G"), checkpoint_pages=8)
    prompts = [tokens(60), np.concatenate([tokens(30, extra=0), tokens(20, seed=3)])]
    for prompt in prompts:
        rank.serve(prompt)
    path = rank.files.files.path
    names = [[key.hex() for key in keys(prompt)] for prompt in prompts]
    by_age = sorted(pages_in(tmp_path), key=lambda page: page.stat().st_mtime_ns)
    for victim in by_age:
        victim.unlink()
        for own, prompt in zip(names, prompts, strict=True):
            there = [path(name).exists() for name in own]
            assert there == sorted(there, reverse=True), "a page is left without the one before"
            windows = [path(f"{name}.swa").exists() for name in own]
            useless = [place for place, has in enumerate(windows) if has and not there[place]]
            assert not useless, "a window is left without its full-attention page"
            best = max(
                (s for s in range(1, sum(there) + 1) if all(windows[max(0, s - WINDOW_PAGES) : s])),
                default=0,
            )
            assert rank.resume(prompt) == best


def test_the_end_of_a_conversation_outlives_the_windows_before_it(tmp_path: Path) -> None:
    """Who goes on resumes at the end; the ends of earlier turns are for branches alone. A window
    whose pages were partly there is used as a whole."""
    rank = Rank(backend(tmp_path, max_size="1G"), checkpoint_pages=0)
    first, second = tokens(20), tokens(21)  # the windows of both ends share a page
    other = tokens(20, seed=5)
    rank.serve(first)
    age(pages_in(tmp_path), 100.0)
    rank.serve(other)
    age(pages_in(tmp_path), 100.0)
    rank.serve(second)
    names = [key.hex() for key in keys(tokens(24))]
    seen = uses_ago(tmp_path)
    assert [seen[name] for name in names[:21]] == [0] * 21
    assert [seen[f"{name}.swa"] for name in names[19:21]] == [0, 0]
    assert {seen[key.hex()] for key in keys(other)} == {1}
    age(pages_in(tmp_path), 100.0)
    rank.serve(tokens(24))
    seen = uses_ago(tmp_path)
    assert [seen[name] for name in names] == [0] * 24
    assert [seen[f"{name}.swa"] for name in names[22:]] == [0, 0]
    assert seen[f"{names[20]}.swa"] == 1, "the end of an earlier turn is kept for nobody"


def uses_ago(directory: Path) -> dict[str, int]:
    """How often the pages were aged since they were used, by name."""
    now = time.time()
    return {page.name: int((now - page.stat().st_mtime) / 100) for page in pages_in(directory)}


def test_what_is_read_is_used_from_its_beginning_on(tmp_path: Path) -> None:
    """A prefix that comes from storage outlives what was written after it."""
    files = backend(tmp_path, max_size="1G")
    Rank(files).serve(tokens(20))
    Rank(files).serve(tokens(20, seed=5))
    age(pages_in(tmp_path), 1000.0)
    fresh = Rank(files)
    prompt = tokens(20)
    fresh.tier.prefetch("a", np.ascontiguousarray(prompt[: 20 * PAGE].reshape(-1, PAGE)), None)
    while not fresh.tier.is_ready("a"):
        fresh.step()
    assert fresh.tier.pop_loaded("a") == (20 * PAGE, 0)
    fresh.storage.close()
    by_age = sorted(pages_in(tmp_path), key=lambda page: page.stat().st_mtime_ns)
    read = [key.hex() for key in keys(prompt)]
    youngest = [page.name for page in reversed(by_age) if page.suffix == ""]
    assert youngest[:20] == read, "not from the beginning on"
    windows = [page.name for page in by_age[-22:] if page.suffix == ".swa"]
    assert sorted(windows) == sorted(f"{name}.swa" for name in read[18:])


def test_a_prompt_larger_than_the_bound_does_not_displace_its_own_beginning(
    tmp_path: Path,
) -> None:
    rank = Rank(backend(tmp_path, max_size=50 * FILE_BYTES))
    rank.serve(tokens(20, seed=5))
    rank.serve(tokens(100))
    assert 40 <= len(pages_in(tmp_path)) <= 50
    assert rank.reach(tokens(100)) - rank.resume(tokens(100)) <= 5
    assert rank.resume(tokens(100)) >= 25
    assert rank.files.events()["full"] > 0


def test_two_servers_of_one_directory_agree_on_what_goes_first(tmp_path: Path) -> None:
    """One writes, the other one continues the conversation and reaches the bound."""
    servers = [Rank(backend(tmp_path, max_size=100 * FILE_BYTES)) for _ in range(2)]
    servers[0].serve(tokens(30))
    servers[1].serve(tokens(40))  # goes on with it
    servers[0].serve(tokens(30, seed=5))
    servers[0].serve(tokens(30, seed=6))
    servers[1].serve(tokens(40, seed=7))
    assert len(pages_in(tmp_path)) * FILE_BYTES <= 100 * FILE_BYTES * (1 + 2 / 16)
    lengths = {0: 40, 5: 30, 6: 30, 7: 40}
    assert_no_holes(servers[0], [tokens(pages, seed) for seed, pages in lengths.items()])
    assert servers[0].resume(tokens(40, 7)) == 40
    assert servers[1].reach(tokens(40)) < 30, "the least recently used was kept"


def test_dp_ranks_share_pages_and_one_bound(tmp_path: Path) -> None:
    """One of eight DP ranks fills the directory. Each of the others writes less than one rank may
    write before it looks, all of them together far more."""
    bound = 160
    files = [backend(tmp_path, writers=8, max_size=bound * FILE_BYTES) for _ in range(8)]
    first, *others = [Rank(own) for own in files]
    first.serve(tokens(100))
    assert all(rank.reach(tokens(100)) == 100 for rank in others), "what one has, all have"
    for seed, rank in enumerate(others, start=1):
        rank.serve(tokens(6, seed=seed))
    assert bound * 0.8 <= len(pages_in(tmp_path)) <= bound * (1 + 2 / 16)
    assert {own.files.path("ff").parents[1].name for own in files} == {"0-of-1"}


# ---- a full disk -------------------------------------------------------------


class Disk:
    """A filesystem of so many bytes, of which others take a part."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.others, self._held = size, 0, 0
        self._writev, self._unlink = os.writev, Path.unlink
        patch.setattr(os, "writev", self.writev)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok))
        patch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, max(0, self.free))
        )

    @property
    def free(self) -> int:
        """Bytes for anybody."""
        return self.size - self._held - self.others

    def fill(self) -> None:
        """Others take all there is."""
        self.others += max(0, self.free)

    def writev(self, descriptor: int, buffers: list[Any]) -> int:
        """See os."""
        if sum(len(buffer) for buffer in buffers) > self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._writev(descriptor, buffers)
        self._held += written
        return written

    def unlink(self, path: Path, missing_ok: bool) -> None:
        """See Path."""
        size = path.stat().st_size if path.exists() else 0
        self._unlink(path, missing_ok=missing_ok)
        self._held -= size


@pytest.mark.parametrize("bound", ["1G", None])
def test_others_who_fill_the_disk_do_not_empty_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str | None
) -> None:
    """Whatever is given up they take; so not more than half is given up, also after restarts, and
    it is used again when there is room. What is left is the beginning of each prompt."""
    disk = Disk(400 * FILE_BYTES, monkeypatch)
    settings = {} if bound is None else {"max_size": bound}
    rank = Rank(backend(tmp_path, **settings))
    rank.serve(tokens(100))
    rank.serve(tokens(100, seed=1))
    held = len(pages_in(tmp_path))
    assert held > 200
    for seed in range(2, 50):
        disk.fill()
        rank.serve(tokens(10, seed=seed))
        disk.fill()
    left = len(pages_in(tmp_path))
    assert held // 2 <= left < held
    assert rank.files.events()["full"] > 0
    lengths = {0: 100, 1: 100, **dict.fromkeys(range(2, 50), 10)}
    assert_no_holes(rank, [tokens(pages, seed) for seed, pages in lengths.items()])
    restarted = backend(tmp_path, **settings)
    assert len(pages_in(tmp_path)) == left
    disk.others -= 50 * FILE_BYTES
    again = Rank(restarted)
    again.serve(tokens(20, seed=99))
    assert again.resume(tokens(20, seed=99)) == 20
    assert len(pages_in(tmp_path)) > left


def test_a_disk_that_the_store_itself_has_filled_goes_on_taking_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is larger than the disk."""
    Disk(200 * FILE_BYTES, monkeypatch)
    rank = Rank(backend(tmp_path, max_size="1G"))
    for seed in range(20):
        rank.serve(tokens(20, seed=seed))
        rank.serve(tokens(20, seed=seed))  # again: what the full disk has refused
    assert len(pages_in(tmp_path)) >= 150
    assert rank.reach(tokens(20, seed=19)) == 20


def test_restarts_of_several_ranks_do_not_empty_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default bound counts what each of them holds once."""
    Disk(400 * FILE_BYTES, monkeypatch)
    for number in range(2):
        Rank(backend(tmp_path, rank=number, ranks=2)).serve(tokens(140))
    held = len(pages_in(tmp_path))
    for seed in range(1, 7):
        for number in range(2):
            Rank(backend(tmp_path, rank=number, ranks=2)).serve(tokens(1, seed))
    assert len(pages_in(tmp_path)) >= 0.8 * held, "each restart loses some"


# ---- the directory -----------------------------------------------------------


def test_a_directory_that_was_removed_is_made_again(tmp_path: Path) -> None:
    base = tmp_path / "kv"
    rank = Rank(backend(base, max_size="1G"))
    rank.serve(tokens(20))
    shutil.rmtree(base)
    rank.serve(tokens(20, seed=1))
    assert rank.resume(tokens(20, seed=1)) == 20
    rank.serve(tokens(30))  # goes on with what has gone
    rank.serve(tokens(30))
    rank.serve(tokens(31))
    assert rank.resume(tokens(31)) == 31
    shutil.rmtree(base)
    assert rank.tier.clear(), "there is nothing to forget"
    rank.serve(tokens(20, seed=2))
    assert rank.resume(tokens(20, seed=2)) == 20


def test_clear_says_when_something_was_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(backend(tmp_path, max_size="1G"))
    rank.serve(tokens(20))
    stays = pages_in(tmp_path)[7]
    unlink = Path.unlink

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        if path == stays:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert not rank.tier.clear()
    assert len(pages_in(tmp_path)) < 20, "the others are still there"
    assert rank.tier.clear()
    assert pages_in(tmp_path) == []


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_clear_is_one_if_every_rank_has_done_it(tmp_path: Path, elsewhere: bool) -> None:
    rank = Rank(backend(tmp_path, max_size="1G"))
    rank.serve(tokens(20))
    front = StorageFront(rank.engine.index, lambda: False)
    assert front.clear(), "there is nothing to forget"
    front.tier = rank.tier
    ranks = types.SimpleNamespace(all_ranks=lambda done: done and elsewhere)
    front.use(ranks, None)  # type: ignore[arg-type]
    assert front.clear() == elsewhere
    assert pages_in(tmp_path) == []
    place = rank.files.files.path("ab" * 32).parent
    place.rmdir()
    place.write_text("in the way")
    assert not front.clear()


def no_directory(base: Path) -> None:
    base.write_text("a file")


def no_place_for_one_of_them(base: Path) -> None:
    place = next(iter(backend(base, max_size="1G").files.path("ab" * 32).parents))
    place.rmdir()
    place.write_text("a file")


@pytest.mark.parametrize("spoil", [no_directory, no_place_for_one_of_them])
def test_a_directory_that_cannot_be_used_stops_the_start(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    base = tmp_path / "kv"
    spoil(base)
    with pytest.raises(StartupError) as error:
        backend(base, max_size="1G")
    message = str(error.value)
    assert "--hicache-storage-backend-extra-config file_storage_path" in message
    assert str(base) in message
    assert "\n" not in message


def test_a_directory_that_may_not_be_written_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is there, from a run as another user."""
    backend(tmp_path, max_size="1G")
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **named)

    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: refuse(path, os.O_WRONLY))
    with pytest.raises(StartupError, match=r"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR.*denied"):
        backend(tmp_path, max_size="1G")


# ---- files that cannot be read -----------------------------------------------


def unreadable(path: Path) -> None:
    """Stands for a file that is there and cannot be read; see the patched ``readv``."""
    path.write_bytes(b"unreadable")


def a_directory(path: Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil", [unreadable, a_directory, a_dangling_link, a_link_to_itself, a_pipe]
)
@pytest.mark.parametrize("removable", [True, False])
def test_what_cannot_be_read_is_a_miss_and_is_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    removable: bool,
) -> None:
    files = backend(tmp_path, max_size="1G")
    Rank(files).serve(tokens(20))
    path = files.files.path(keys(tokens(20))[7].hex())
    good = path.read_bytes()
    spoil(path)
    readv, unlink = os.readv, Path.unlink

    def read(descriptor: int, buffers: list[Any]) -> int:
        if os.fstat(descriptor).st_size == len(b"unreadable"):
            raise OSError(errno.EIO, "Input/output error")
        return readv(descriptor, buffers)

    def refuse(this: Path, *, missing_ok: bool = False) -> None:
        if this == path:
            raise OSError(errno.EIO, "Input/output error")
        unlink(this, missing_ok=missing_ok)

    monkeypatch.setattr(os, "readv", read)
    if not removable:
        monkeypatch.setattr(Path, "unlink", refuse)
    fresh = Rank(files)
    prompt = np.ascontiguousarray(tokens(20)[: 20 * PAGE].reshape(-1, PAGE))
    fresh.tier.prefetch("a", prompt, None)
    while not fresh.tier.is_ready("a"):
        fresh.step()
    assert fresh.tier.pop_loaded("a")[0] <= 7 * PAGE
    assert fresh.reach(tokens(20)) == 7, "it is found again"
    again = Rank(files)
    again.serve(tokens(20))
    assert again.resume(tokens(20)) == 20
    assert path.read_bytes() == good
    assert stat.S_ISREG(path.lstat().st_mode)


# ---- old identities ----------------------------------------------------------


def test_the_bound_is_over_every_model_and_the_oldest_pages_go_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = {"max_size": 200 * FILE_BYTES}
    old = Rank(backend(tmp_path, identity=b"a" * 16, **bound))
    old.serve(tokens(80))
    age(pages_in(tmp_path), 1000.0)
    dead = Rank(backend(tmp_path, identity=b"b" * 16, **bound))
    dead.serve(tokens(80))
    age(pages_in(tmp_path), 1000.0)
    caplog.set_level("INFO")
    caplog.clear()
    live = Rank(backend(tmp_path, identity=b"c" * 16, **bound))
    said = [r.getMessage() for r in caplog.records if str(tmp_path) in r.getMessage()]
    assert len(said) == 1
    others = len(pages_in(tmp_path)) * FILE_BYTES / 1e9
    assert f"{others:.2f} GB more of other models" in said[0]
    for seed in range(4):
        live.serve(tokens(30, seed=seed))
    assert len(pages_in(tmp_path)) <= 200
    assert old.reach(tokens(80)) == 0
    assert [live.resume(tokens(30, seed=seed)) for seed in range(4)] == [30] * 4, "it starves"


def test_each_rank_looks_after_its_part_of_what_others_left(tmp_path: Path) -> None:
    """Four ranks of an old server; the two of a new one bound all of it between them."""
    for number in range(4):
        Rank(backend(tmp_path, b"a" * 16, number, 4, max_size="1G")).serve(tokens(40))
    age(pages_in(tmp_path), 1000.0)
    before = len(pages_in(tmp_path))
    ranks = [
        Rank(backend(tmp_path, b"b" * 16, number, 2, max_size=240 * FILE_BYTES))
        for number in range(2)
    ]
    for rank in ranks:
        rank.serve(tokens(60))
        rank.serve(tokens(1, seed=9))
        assert rank.resume(tokens(60)) == 60
    assert before > 200
    assert len(pages_in(tmp_path)) <= 240


def test_a_live_server_of_another_model_keeps_what_it_uses(tmp_path: Path) -> None:
    """Both of them write; each gives way with what it has not used for longest."""
    bound = {"max_size": 100 * FILE_BYTES}
    one = Rank(backend(tmp_path, identity=b"a" * 16, **bound))
    two = Rank(backend(tmp_path, identity=b"b" * 16, **bound))
    for seed in range(8):
        one.serve(tokens(20, seed=seed))
        two.serve(tokens(20, seed=seed))
    assert len(pages_in(tmp_path)) <= 100 * (1 + 2 / 16)
    for server in (one, two):
        assert server.resume(tokens(20, seed=7)) == 20


def test_directories_that_old_models_left_empty_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend(tmp_path, identity=b"a" * 16, max_size="1G")
    (tmp_path / "not ours" / "0-of-1" / "ab").mkdir(parents=True)
    (tmp_path / "not ours" / "0-of-1" / "ab" / "notes.txt").write_text("keep me")
    backend(tmp_path, identity=b"b" * 16, max_size="1G")
    assert len(list(tmp_path.glob("model-*"))) == 2, "somebody may just have begun"
    monkeypatch.setattr(file_eviction, "_ABANDONED_AFTER_S", -1.0)
    backend(tmp_path, identity=b"b" * 16, max_size="1G")
    assert [p.name for p in tmp_path.glob("model-*")] == [f"model-{b'b'.hex() * 8}"]
    assert (tmp_path / "not ours" / "0-of-1" / "ab" / "notes.txt").read_text() == "keep me"


# ---- lookups -----------------------------------------------------------------


class Counted(set):  # type: ignore[type-arg]
    """A set that knows how many elements were put into such sets."""

    elements = 0

    def __init__(self, elements: Any = ()) -> None:
        super().__init__(elements)
        Counted.elements += len(self)


def test_a_lookup_takes_as_many_steps_as_there_are_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: lines of the backend that are run, files that are looked for."""
    files = backend(tmp_path, max_size="1G")
    looked: list[str] = []
    monkeypatch.setattr(files.files, "exists", lambda name: looked.append(name) or True)
    monkeypatch.setattr("sglang_ext.adapter.file_backend.set", Counted, raising=False)

    def work(count: int) -> int:
        names = [f"{number:064x}" for number in range(count)]
        looked.clear()
        Counted.elements = 0
        windows = PoolTransfer(
            name=PoolName.SWA, keys=[""] * 8, hit_policy=PoolHitPolicy.TRAILING_PAGES
        )
        found = files.batch_exists_v2(names, [windows])
        assert found.restorable_prefix_pages == list(range(1, count + 1))
        assert found.kv_hit_pages == count
        return len(looked) + Counted.elements

    assert work(512) <= 8 * work(64)


def test_resume_points_are_where_pages_and_windows_are(tmp_path: Path) -> None:
    """Beside a slow reading of what a resume point is, with holes at random."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        count, window = int(rng.integers(1, 30)), int(rng.integers(1, 6))
        full, swa = rng.random(count) < 0.95, rng.random(count) < 0.7
        names = [f"{number:064x}" for number in range(count)]
        there = {n for n, has in zip(names, full, strict=True) if has}
        there |= {f"{n}.swa" for n, has in zip(names, swa, strict=True) if has}
        files = backend(tmp_path, max_size="1G")
        files.files.exists = there.__contains__  # type: ignore[method-assign]
        trailing = PoolTransfer(
            name=PoolName.SWA, keys=[""] * window, hit_policy=PoolHitPolicy.TRAILING_PAGES
        )
        found = files.batch_exists_v2(names, [trailing])
        expected = list(resume_points(full, swa, window))
        assert found.restorable_prefix_pages == expected
        assert found.kv_hit_pages == max(expected, default=0)


def resume_points(full: np.ndarray, swa: np.ndarray, window: int) -> Iterator[int]:
    """By the definition."""
    for stop in range(1, len(full) + 1):
        if full[:stop].all() and swa[max(0, stop - window) : stop].all():
            yield stop
