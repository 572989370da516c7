"""The architectures of which there are tiny models, and where these are kept between runs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from launch.models import dflash, gemma4, gpt_oss, llama4, mimo_v2, step
from launch.models.kept import kept

MAKERS: dict[str, Callable[[Path], Path]] = {
    "gpt-oss": gpt_oss.make,
    "mimo-v2": mimo_v2.make,
    "gemma-4": gemma4.make,
    "llama-4": llama4.make,
}
"""What writes config, weights and tokenizer of one into a directory, by name."""
DRAFTING: dict[str, Callable[[Path], Path]] = {
    "gpt-oss-eagle3": gpt_oss.make_draft,
    "mimo-v2-dflash": dflash.make,
    "llama-4-eagle3": llama4.make_draft,
    "gemma-4-assistant": gemma4.make_assistant,
    "step-3.5": step.make_with_drafts,
}
"""The same for speculative decoding: drafts for models above, and a model with layers that draft;
MiMo-V2 has some too."""


def ready_made(name: str) -> Path:
    """The model of that name, made unless one is there that the code of this folder has made."""
    make = {**MAKERS, **DRAFTING}[name]
    # makers take widths and what they share from each other
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=4)
    out = Path(__file__).resolve().parents[2] / ".models" / f"{name}-{digest.hexdigest()}"
    return kept(out, make)
