"""What KV is of: pages of another model, another layout or another engine are not ours."""

import hashlib
import json
from pathlib import Path
from typing import Any

_FORMAT = 1
_SAMPLE = 1 << 16
"""Bytes read at the beginning, in the middle and at the end of a weights file."""


def identity(model_path: str, kv: dict[str, Any]) -> bytes:
    """16 bytes that differ where KV differs.

    Weights are told apart by samples of their files: a name or a path says too little, and to
    read all of them takes minutes.

    Args:
        model_path: directory of the model; anything else counts by its name alone.
        kv: what else decides on the bytes of a page; JSON.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([_FORMAT, kv], sort_keys=True).encode())
    root = Path(model_path)
    if not root.is_dir():
        digest.update(model_path.encode())
        return digest.digest()
    for path in sorted(root.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".pt", ".gguf"):
            _add_samples(digest, path)
    return digest.digest()


def _add_samples(digest: "hashlib.blake2b", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLE)):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
