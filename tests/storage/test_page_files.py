"""Pages in files: whole or not there, whatever happens to the file, its writer or the disk."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from sglang_ext.storage.file_eviction import Eviction
from sglang_ext.storage.page_directories import TEMPORARY, Share
from sglang_ext.storage.page_files import PageFiles

SIZE = 3000


def name(number: int) -> str:
    """A page's name, spread over the directories."""
    return f"{number * 2654435761 % 2**32:08x}"


def content(number: int, size: int = SIZE) -> bytes:
    """What page ``number`` holds."""
    return random.Random(number).randbytes(size)


def files(root: Path, most: int | None = None, identity: bytes = b"me") -> PageFiles:
    """A directory of pages."""
    return PageFiles(root / "model" / "0-of-1", identity, Eviction(Share(root), most))


def put(pages: PageFiles, number: int, size: int = SIZE) -> bool:
    """Write a page in two pieces."""
    data = bytearray(content(number, size))
    return pages.write(name(number), [memoryview(data)[:1000], memoryview(data)[1000:]])


def get(pages: PageFiles, number: int, size: int = SIZE) -> bytes | None:
    """Read it in three."""
    data = bytearray(b"x" * size)
    view = memoryview(data)
    good = pages.read(name(number), [view[:1], view[1:2000], view[2000:]])
    return bytes(data) if good else None


def test_two_writers_with_one_number_do_not_meet(tmp_path: Path) -> None:
    """Processes in two containers, which may have one number, write the same page at once."""
    writers = [files(tmp_path) for _ in range(2)]
    begun = [writer.temporary(writer.path(name(1))) for writer in writers]
    assert begun[0] != begun[1]


def test_a_page_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pages = files(tmp_path)
    assert get(pages, 1) is None
    assert put(pages, 1)
    assert put(pages, 1), "a page that is there"
    assert get(pages, 1) == content(1)
    assert get(files(tmp_path), 1) == content(1), "after a restart"
    pages.clear()
    assert get(pages, 1) is None
    assert put(pages, 1)
    assert get(pages, 1) == content(1)


def test_a_clear_takes_what_is_its_own_alone(tmp_path: Path) -> None:
    """Stock's takes the whole directory, see ``findings/sglang-file-storage-clear.sh``."""
    pages, other = (
        files(tmp_path),
        PageFiles(
            tmp_path / "another model" / "0-of-1", b"another", Eviction(Share(tmp_path), None)
        ),
    )
    note = tmp_path / "notes.txt"
    note.write_text("of somebody else")
    assert put(pages, 1) and put(other, 1)
    pages.clear()
    assert get(pages, 1) is None
    assert get(other, 1) == content(1)
    assert note.exists()


def _clear_with_others(root: Path, together: Barrier, failed: "SimpleQueue[str]") -> None:
    pages = files(root)
    together.wait(60)
    try:
        pages.clear()
    except OSError as error:
        failed.put(str(error))


def test_ranks_that_share_a_directory_may_clear_it_at_once(tmp_path: Path) -> None:
    """DP ranks do; who finds a page gone goes on."""
    ranks, pages = 4, files(tmp_path)
    for number in range(500):
        assert put(pages, number, 10)
    together = multiprocessing.Barrier(ranks)
    failed: SimpleQueue[str] = multiprocessing.SimpleQueue()
    processes = [
        multiprocessing.Process(target=_clear_with_others, args=(tmp_path, together, failed))
        for _ in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failed.empty(), failed.get()
    assert not any(get(pages, number, 10) for number in range(500))


def test_every_kind_of_damage_is_a_miss_and_is_counted(tmp_path: Path) -> None:
    """Every bit of the header, bits of the payload, every length."""
    pages = files(tmp_path)
    assert put(pages, 1)
    path = pages.path(name(1))
    good = path.read_bytes()
    rng = random.Random(1)
    bits = [*range(48 * 8), *(rng.randrange(64 * 8, len(good) * 8) for _ in range(200))]
    damaged = []
    for bit in bits:
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [good[:length] for length in (0, 1, 63, 64, 65, len(good) - 1)]
    damaged += [good + b"x", bytes(len(good)), good[:64] + bytes(len(good) - 64)]
    for number, data in enumerate(damaged, start=1):
        path.write_bytes(data)
        assert get(pages, 1) is None, f"damage number {number} was taken for a page"
        assert not path.exists(), "it would be found again"
        counters = pages.counters
        assert counters.damaged + counters.foreign == number
    assert put(pages, 1)
    assert get(pages, 1) == content(1)


def test_a_page_of_another_name_or_another_model_is_foreign(tmp_path: Path) -> None:
    pages = files(tmp_path)
    assert put(pages, 1)
    pages.path(name(2)).write_bytes(pages.path(name(1)).read_bytes())
    assert get(pages, 2) is None
    assert pages.counters.foreign == 1
    other = files(tmp_path, identity=b"another model")
    assert get(other, 1) is None
    assert other.counters.foreign == 1


def test_pages_of_another_size_are_not_read(tmp_path: Path) -> None:
    pages = files(tmp_path)
    assert put(pages, 1)
    assert get(pages, 1, SIZE - 1) is None
    assert put(pages, 1)
    assert get(pages, 1, SIZE + 1) is None


def test_the_bound_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    each = SIZE + 64
    pages = files(tmp_path, most=20 * each)
    for number in range(20):
        assert put(pages, number)
        os.utime(pages.path(name(number)), (1000 + number, 1000 + number))
    pages.use([name(0)])
    for number in range(20, 25):
        assert put(pages, number)
    held = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert sum(path.stat().st_size for path in held) <= 20 * each
    assert get(pages, 0) == content(0), "it was used"
    assert get(pages, 1) is None
    assert get(pages, 24) == content(24)
    assert pages.removed > 0
    assert not put(pages, 99, 21 * each), "larger than the bound"
    assert pages.counters.full == 1


def test_a_full_disk_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = files(tmp_path)
    assert put(pages, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        assert not put(pages, 2)
    assert pages.counters.full == 1
    assert get(pages, 2) is None
    assert not list(tmp_path.rglob(f"{TEMPORARY}*")), "what was begun is gone"
    assert put(pages, 2)


def test_what_a_killed_writer_left_is_removed_at_start(tmp_path: Path) -> None:
    pages = files(tmp_path)
    assert put(pages, 1)
    old, young = (pages.path(name(1)).with_name(f"{TEMPORARY}{n}") for n in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    pages = files(tmp_path)
    assert not old.exists()
    assert young.exists(), "somebody may be writing it"
    assert get(pages, 1) == content(1)


def _work(root: Path, seed: int) -> None:
    pages = files(root, most=30 * (SIZE + 64))
    rng = random.Random(seed)
    for _ in range(400):
        number = rng.randrange(60)
        if rng.random() < 0.5:
            put(pages, number)
        else:
            assert get(pages, number) in (None, content(number)), "another page's contents"
    assert pages.counters.damaged == pages.counters.foreign == 0, "a reader saw half a file"


def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(_work, [(tmp_path, seed) for seed in range(3)])
    held = [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ""]
    # each process may have written a sixteenth of the bound since it looked
    assert sum(held) <= 30 * (SIZE + 64) * (1 + 3 / 16) + 3 * (SIZE + 64)


def _write_until_killed(root: Path, number: int) -> None:
    pages = files(root)
    while True:
        put(pages, number, 200_000)
        number += 1


def test_a_writer_that_is_killed_leaves_no_torn_page(tmp_path: Path, full: bool) -> None:
    """SIGKILL at random points while it writes; what has a name is whole."""
    rng = random.Random(7)
    watched, written, kills = files(tmp_path), 0, 100 if full else 25
    for attempt in range(kills):
        first = attempt * 1000
        writer = os.fork()
        if writer == 0:
            _write_until_killed(tmp_path, first)
        begun = time.monotonic()
        while not watched.exists(name(first)):
            assert time.monotonic() < begun + 120, "it writes nothing"
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        pages = files(tmp_path)
        number = first
        while pages.exists(name(number)):
            assert get(pages, number, 200_000) == content(number, 200_000)
            number += 1
        written += number - first
        assert pages.counters.damaged == pages.counters.foreign == 0
        pages.clear()
    assert written > kills, "it was killed before it wrote anything"
