"""A checkpoint on disk: told from another one by what is in its tensors.

To read all of a large one takes minutes, so it is sampled: headers and configuration whole,
tensors of up to 64 KiB whole, and of a larger tensor its two ends and 4 KiB in each MiB, at a
place that moves from one MiB to the next, so that every column of a matrix is met.

Found for certain: another tensor, shape, type or option; a tensor that was changed as a whole;
2 MiB or more in a row inside one. A change of fewer bytes in a tensor is found if a sample
meets it: one byte in 256 is read. Neither path nor host nor the time of a file matters.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Span = tuple[int, int]
"""First byte in a file, number of bytes."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIGURATION = (".json", ".py")
_OF_NO_MATTER = (
    *("tokenizer", "vocab", "added_tokens", "special_tokens", "merges"),
    *("generation_config", "chat_template", "preprocessor", "processor"),
)
"""Files that decide on tokens, not on what is computed from them."""
_WHOLE = 1 << 16
_BLOCK, _SAMPLE = 1 << 20, 1 << 12
_STEP = 97
"""Samples move by so many places from block to block; prime to the number of places."""
_READERS, _READS_AT_ONCE = 16, 64
_LONGEST_HEADER = 100 << 20
"""As the format has it."""

Stamp = tuple[tuple[str, int, int, int, int], ...]


def find(model_path: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Where the files of a model are on this machine, None if that cannot be known.

    Args:
        model_path: a directory, a file, or a name on the hub whose snapshot is here.
        revision: of a name on the hub.
        cache: directory of snapshots to look into before the usual one.
    """
    path = Path(model_path)
    if path.exists():
        return path
    if "://" in model_path:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for directory in [cache, None] if cache else [None]:
        try:
            found = snapshot_download(
                model_path, revision=revision, cache_dir=directory, local_files_only=True
            )
        except (OSError, ValueError, HFValidationError):
            continue
        return Path(found)
    return None


def stamp(root: Path) -> Stamp:
    """What changes when somebody writes to a file of the checkpoint, on this machine.

    Raises:
        OSError: a file cannot be looked at.
    """
    states = [(path.name, path.stat()) for path in _files(root, _WEIGHTS + _CONFIGURATION)]
    return tuple((name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in states)


def configuration(root: Path) -> bytes:
    """Digest of all that is not weights and decides on what is computed.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in _files(root, _CONFIGURATION):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)} ".encode())
        digest.update(text)
    return digest.digest()


def weights(root: Path) -> bytes | None:
    """Digest of the weights, None if there are none.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = _files(root, _WEIGHTS)
    with ThreadPoolExecutor(_READERS) as readers:
        for path in files:
            with path.open("rb", buffering=0) as file:
                number, size = file.fileno(), os.fstat(file.fileno()).st_size
                digest.update(f"{path.name} {size} ".encode())
                for data in _digests(number, _samples(number, size, path.suffix), readers):
                    digest.update(data)
    return digest.digest() if files else None


def tensor_names(root: Path) -> frozenset[str] | None:
    """Names of all tensors, None if the format does not say.

    Raises:
        OSError: a file cannot be read.
    """
    names: set[str] = set()
    for path in _files(root, _WEIGHTS):
        with path.open("rb", buffering=0) as file:
            number, size = file.fileno(), os.fstat(file.fileno()).st_size
            header = _header(number, size) if path.suffix == ".safetensors" else None
        if header is None:
            return None
        names |= header[1].keys()
    return frozenset(names) or None


def architecture(root: Path) -> str:
    """What the model is called by its configuration."""
    try:
        names = json.loads((root / "config.json").read_bytes())["architectures"]
        return str(names[0])
    except (OSError, ValueError, LookupError, TypeError):
        return "model"


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix in suffixes else []
    return sorted(
        path
        for path in root.iterdir()
        if path.suffix in suffixes and not path.name.startswith(_OF_NO_MATTER) and path.is_file()
    )


def _header(file: int, size: int) -> tuple[int, dict[str, Span]] | None:
    """(bytes in front of the data, where each tensor is) of a safetensors file; None: it is
    none."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        return None
    try:
        entries = json.loads(os.pread(file, length, 8))
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            first, end = entry["data_offsets"]
            tensors[name] = (8 + length + int(first), int(end) - int(first))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return 8 + length, tensors


def _samples(file: int, size: int, suffix: str) -> Iterator[Span]:
    """What is read of a file, in order."""
    header = _header(file, size) if suffix == ".safetensors" else None
    if header is None:
        yield from _samples_of((0, size))
        return
    yield 0, header[0]
    for span in sorted(header[1].values()):
        yield from _samples_of(span)


def _samples_of(span: Span) -> Iterator[Span]:
    first, length = span
    if length <= _WHOLE:
        yield span
        return
    yield first, _SAMPLE
    places = _BLOCK // _SAMPLE - 1
    for block in range(-(-length // _BLOCK)):
        place = block * _BLOCK + block * _STEP % places * _SAMPLE
        yield first + min(place, length - _SAMPLE), _SAMPLE
    yield first + length - _SAMPLE, _SAMPLE


def _digests(file: int, spans: Iterable[Span], readers: ThreadPoolExecutor) -> Iterator[bytes]:
    """Digests of so many spans each."""

    def read(batch: tuple[Span, ...]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for first, length in batch:
            digest.update(os.pread(file, length, first))
        return digest.digest()

    remaining = iter(spans)
    batches = iter(lambda: tuple(itertools.islice(remaining, _READS_AT_ONCE)), ())
    yield from readers.map(read, batches)
