"""The options of a launch line that decide on KV memory, by the engine's names.

Everything else on the line belongs to the engine and is left alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from sglang_ext.arguments import Parser, number, whole

HOST_OPTIONS = "--hicache-size or --hicache-ratio"
KV_TYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
"""Types of KV with at most one scale for each layer. FP4 and MXFP8 have one for each block, in
memory of their own, which neither the host nor storage would get."""


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchLine:
    """What a launch line says; defaults are the engine's.

    Attributes:
        model: path or id, None where the line names none.
        tp, dp: ranks of tensor and data parallelism; with ``dp_attention`` the second are among
            the first.
        host_tier: whether an option asks for one; a variable may do it too.
        hicache_size: GB of a rank, 0 where the ratio counts.
        max_total_tokens: of the device's full-attention pool, None where its memory decides.
        swa_full_tokens_ratio: None where the model decides.
        draft_model: path or id; draft_kv_cache_dtype: None for that of the model.
        others: options that are not among these.
    """

    model: str | None = None
    tp: int = 1
    dp: int = 1
    dp_attention: bool = False
    nodes: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    page_size: int = 1
    host_tier: bool = False
    hicache_size: float = 0.0
    hicache_ratio: float = 2.0
    max_total_tokens: int | None = None
    swa_full_tokens_ratio: float | None = None
    write_policy: str = "write_through"
    io_backend: str = "kernel"
    storage_backend: str | None = None
    storage_settings: str | None = None
    speculative: str | None = None
    draft_model: str | None = None
    draft_kv_cache_dtype: str | None = None
    others: tuple[str, ...] = ()

    @property
    def sharing(self) -> int:
        """Ranks that share the heads of a layer."""
        return max(1, self.tp // self.dp) if self.dp_attention else self.tp

    @property
    def ranks(self) -> int:
        """Ranks of the server, each with host memory of its own."""
        return self.tp if self.dp_attention else self.tp * self.dp


_OPTIONS: dict[tuple[str, ...], tuple[str, dict[str, object]]] = {
    ("--model-path", "--model"): ("model", {}),
    ("--tp-size", "--tensor-parallel-size", "--tp"): ("tp", {"type": whole(1)}),
    ("--dp-size", "--data-parallel-size", "--dp"): ("dp", {"type": whole(1)}),
    ("--enable-dp-attention",): ("dp_attention", {"action": "store_true"}),
    ("--nnodes",): ("nodes", {"type": whole(1)}),
    ("--dtype",): (
        "dtype",
        {"choices": ("auto", "half", "float16", "bfloat16", "float", "float32")},
    ),
    ("--kv-cache-dtype",): ("kv_cache_dtype", {"choices": KV_TYPES}),
    ("--page-size",): ("page_size", {"type": whole(1)}),
    ("--enable-hierarchical-cache", "--enable-hicache"): ("host_tier", {"action": "store_true"}),
    ("--hicache-size",): ("hicache_size", {"type": number(0, 1e6), "metavar": "GB"}),
    ("--hicache-ratio",): ("hicache_ratio", {"type": number(above=0)}),
    ("--max-total-tokens",): ("max_total_tokens", {"type": whole(1)}),
    ("--swa-full-tokens-ratio",): ("swa_full_tokens_ratio", {"type": number(above=0, most=1)}),
    ("--hicache-write-policy",): ("write_policy", {}),
    ("--hicache-io-backend",): ("io_backend", {}),
    ("--hicache-storage-backend",): ("storage_backend", {}),
    ("--hicache-storage-backend-extra-config",): ("storage_settings", {}),
    ("--speculative-algorithm",): ("speculative", {}),
    ("--speculative-draft-model-path", "--speculative-draft-model"): ("draft_model", {}),
    ("--speculative-draft-kv-cache-dtype",): ("draft_kv_cache_dtype", {"choices": KV_TYPES}),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a launch line, to a parser that may have some of its own."""
    group = parser.add_argument_group("launch line, named as the engine's own options")
    for flags, (name, more) in _OPTIONS.items():
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, **more)  # type: ignore[arg-type]


def from_options(given: argparse.Namespace, others: Sequence[str] = ()) -> LaunchLine:
    """What was given of the options that ``add_options`` has added."""
    names = [field.name for field in dataclasses.fields(LaunchLine)]
    said = {name: getattr(given, name) for name in names if hasattr(given, name)}
    options = tuple(word.partition("=")[0] for word in others if word.startswith("--"))
    return LaunchLine(**said, others=options)


def take_apart(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(variables, options) of a line that may begin with variables and the command."""
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    pairs = (word.partition("=") for word in words[:first])
    return {name: value for name, is_one, value in pairs if is_one}, list(words[first:])


def parse(words: Sequence[str], prog: str) -> LaunchLine:
    """The options of a line.

    Args:
        prog: what an error begins with.
    """
    parser = Parser(prog=prog, add_help=False, allow_abbrev=False)
    add_options(parser)
    given, others = parser.parse_known_args(words)
    return from_options(given, others)
