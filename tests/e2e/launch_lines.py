"""Lines that operators start these models with, as published, and servers of tiny models for each.

The page that lists them is written by

    python -m tests.e2e.launch_lines docs/launch-lines.md
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from launch.configuration import table, write
from launch.models.architectures import ready_made
from launch.server import dp_attention
from launch.traffic import Traffic
from tests.e2e.drafts import KINDS, Drafting

TRAFFIC = Traffic(conversations=6, rounds=3, seed=7)
# what is rounded is computed one request at a time, and so the same in every run
ROUNDED = Traffic(conversations=6, rounds=3, parallel=1, seed=30)
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
PAGE_64 = ("--page-size", "64")
A_LINE = "tests/e2e/test_launch_lines.py::test_a_line"
GPU_ONLY = ("--attention-backend", "--hicache-io-backend")
"""Options of published lines that are not given here."""
SIZES = ("--tp", "--dp", "--ep", "--speculative-draft-model-path")
"""Those that have another value here."""


class Line(NamedTuple):
    """What a server is started with.

    Attributes:
        published: the options of the source, without the model's.
        kind: the model and its drafts.
        options: of the line, for the server without a cache too.
        host: its host tier.
        tokens: size of the device pool: conversations come back from the host.
        rounded: whether KV is rounded when it is written (see ``rounded.py``).
        ranks: options of two ranks.
        events: what subscribers of KV events ask for; None without any.
        tests: others that the line is in.
    """

    published: str
    kind: Drafting
    options: tuple[str, ...] = ()
    host: tuple[str, ...] = HOST
    tokens: int = 1536
    traffic: Traffic = TRAFFIC
    rounded: bool = False
    ranks: Callable[[], list[str]] = lambda: ["--tp", "2"]
    events: dict[str, str] | None = None
    tests: tuple[str, ...] = ()


def dp_ranks() -> list[str]:
    """Two DP ranks."""
    return dp_attention(2)


def plain(name: str) -> Drafting:
    """A model without drafts."""
    return Drafting(lambda: ready_made(name), ())


def chain(kind: Drafting, steps: int) -> Drafting:
    """The same with as many draft tokens one behind the other."""
    lengths = ("--speculative-num-steps", str(steps), "--speculative-num-draft-tokens")
    return kind._replace(options=(*kind.options, *lengths, str(steps + 1)))


CHAIN = "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
LAYERS = "--speculative-algorithm EAGLE --enable-multi-layer-eagle"

LINES = {
    "sglang pull 23391, gpt-oss-120b": Line(
        "--tp 2 --page-size 64 --attention-backend fa3 --enable-hierarchical-cache "
        "--hicache-ratio 2.0 --hicache-write-policy write_through --hicache-io-backend kernel",
        plain("gpt-oss"),
        PAGE_64,
        (*HOST[:1], "--hicache-ratio", "2.0", "--hicache-write-policy", "write_through"),
    ),
    "sglang issue 24869, Gemma 4": Line(
        "--tp 2 --kv-cache-dtype fp8_e4m3 --page-size 64 --hicache-ratio 1 "
        "--hicache-write-policy write_through_selective --hicache-io-backend kernel "
        "--hicache-mem-layout page_first",
        plain("gemma-4"),
        (*PAGE_64, "--kv-cache-dtype", "fp8_e4m3"),
        (
            *(*HOST[:1], "--hicache-ratio", "1", "--hicache-mem-layout", "page_first"),
            *("--hicache-write-policy", "write_through_selective"),
        ),
        tokens=2048,
        traffic=ROUNDED,
        rounded=True,
    ),
    "cookbook, gpt-oss with EAGLE3": Line(
        f"--tp 8 --speculative-algorithm EAGLE3 {CHAIN} "
        "--speculative-draft-model-path nvidia/gpt-oss-120b-Eagle3",
        KINDS["eagle3"],
    ),
    "cookbook, Gemma 4 with its assistant": Line(
        "--tp-size 2 --speculative-algorithm NEXTN --speculative-num-steps 5 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 6 "
        "--speculative-draft-model-path google/gemma-4-31B-it-assistant",
        chain(KINDS["gemma-4"], 5),
    ),
    # each DP rank has a device of its own
    "cookbook, MiMo-V2-Flash": Line(
        f"--tp-size 8 --dp-size 2 --enable-dp-attention {LAYERS}",
        KINDS["mimo-v2"],
        tokens=768,
        ranks=dp_ranks,
    ),
    "sglang test_unified_radix_cache_kl_mimo.py, MiMo-V2.5": Line(
        f"--tp 8 --dp 2 --enable-dp-attention --enable-dp-lm-head {LAYERS} {CHAIN} "
        "--page-size 64 --enable-hierarchical-cache --hicache-ratio 4 "
        "--hicache-mem-layout page_first",
        KINDS["mimo-v2"],
        (*PAGE_64, "--enable-dp-lm-head"),
        (*HOST, "--hicache-mem-layout", "page_first"),
        tokens=1024,
        ranks=dp_ranks,
        tests=(
            "tests/e2e/test_dp_drafts.py::test_an_idle_rank_beside_one_that_drafts",
            "tests/e2e/test_dp_drafts.py::test_drafts_after_hits_on_the_hosts",
        ),
    ),
    "cookbook, MiMo-V2.5 on B200": Line("--tp 4 --speculative-algorithm EAGLE", KINDS["mimo-v2"]),
    "cookbook, MiMo-V2.5-Pro": Line(
        "--tp 8 --swa-full-tokens-ratio 0.1 --speculative-algorithm EAGLE",
        KINDS["mimo-v2"],
        ("--swa-full-tokens-ratio", "0.1"),
        tokens=8192,
    ),
    "sglang pull 40448, MiMo-V2.6": Line(
        "--page-size 1 --swa-full-tokens-ratio 0.03 --speculative-algorithm DFLASH",
        KINDS["dflash"],
        ("--page-size", "1", "--swa-full-tokens-ratio", "0.03"),
        tokens=24576,
    ),
    "cookbook, Step-3.5-Flash": Line("--tp 4 --ep 4", plain("step-3.5"), ("--ep", "2")),
    "cookbook, Step-3.5-Flash with MTP": Line(
        f"--tp 4 --ep 4 {LAYERS}", KINDS["step-3.5"], ("--ep", "2")
    ),
    "cookbook, Llama 4 Scout": Line(
        "--tp 8 --context-length 1000000", plain("llama-4"), ("--context-length", "1000000")
    ),
    "cookbook, Llama 4 Maverick with EAGLE3": Line(
        "--tp 8 --speculative-algorithm EAGLE3", KINDS["llama-4"]
    ),
    "Dynamo, workers of a KV router": Line(
        "--page-size 16 --kv-events-config",
        plain("gpt-oss"),
        ("--page-size", "16"),
        events={"format": "dynamo"},
        tests=(
            "tests/e2e/test_inside_a_page.py::"
            "test_each_request_finds_what_the_engines_own_cache_finds",
        ),
    ),
    "llm-d, workers of a KV router": Line(
        "--page-size 64 --kv-events-config",
        plain("gpt-oss"),
        PAGE_64,
        events={},
        tests=("tests/e2e/test_server.py::test_two_ranks_agree",),
    ),
}
"""By their sources."""

ELSEWHERE = {
    "sglang and Mooncake documents, PD disaggregation": (
        "--disaggregation-mode prefill --enable-hierarchical-cache",
        "tests/e2e/test_disaggregation.py::"
        "test_tokens_are_exact_and_those_who_leave_take_nothing_along",
    ),
}
"""Lines of more than one server: (options, test)."""

POOLS_ALONE = {
    "sglang issue 25068, DeepSeek-V4": (
        "--tp 8 --hicache-mem-layout page_first_direct --hicache-io-backend direct "
        "--enable-hierarchical-cache --hicache-ratio 2 --swa-full-tokens-ratio 0.4",
        "tests/adapter/test_deepseek_v4.py::"
        "test_conversations_read_what_they_wrote_in_every_tier_and_after_a_restart",
    ),
}
"""Lines of models whose kernels are for GPUs alone: (options, test)."""

_HEAD = """# Published launch lines

Lines that operators start these models with, without the model's name and what does not matter
here, and tests that start servers with them: tiny models of the same architectures, on CPUs.
Answers are those of a server without a prefix cache and without drafts, and some prefixes come from
the host. Where KV is rounded to fp8, log-probabilities are. Lines without a host tier get one. A
model whose kernels are for GPUs alone does not run here: the engine's pools and allocator do, with
rows that name their prefix in place of KV.

"""


def rows() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(source, published options, what becomes of the line, its tests) of each."""
    for source, line in LINES.items():
        yield source, line.published, "served", (A_LINE, *line.tests)
    for source, (published, test) in ELSEWHERE.items():
        yield source, published, "served", (test,)
    for source, (published, test) in POOLS_ALONE.items():
        yield source, published, "served, its pools alone", (test,)


def page() -> str:
    """The document."""
    left_out, sizes = (", ".join(f"`{name}`" for name in names) for names in (GPU_ONLY, SIZES))
    cells = (
        (source, f"`{published}`", here, ", ".join(f"`{test}`" for test in tests))
        for source, published, here, tests in rows()
    )
    lines = table(("source", "line", "here", "test"), cells)
    return f"{_HEAD}{lines}\nLeft out: {left_out}. With other values: {sizes}.\n"


def main() -> None:
    """Command line."""
    write(page, __doc__.splitlines()[0])


if __name__ == "__main__":
    main()
