"""Lines that operators start these models with, as published, on tiny models of the same
architectures.

Of a line is left out what asks for a GPU (attention backends, ``--hicache-io-backend kernel``), and
of ``--tp`` more than two ranks. Lines without a host tier get one. Answers are those of a server
without a prefix cache and without drafts. Lines with PD disaggregation or KV events are in tests of
their own (``test_disaggregation.py``, ``test_server.py``). Lines with DP attention and drafts are
not here: on a CPU a kernel of the engine for layers that draft ends a rank.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from launch.models.architectures import ready_made
from launch.server import OURS, STRICT_CHECKS
from launch.traffic import Traffic
from tests.e2e.conftest import COMMON, RANKS, assert_idle_and_alive
from tests.e2e.conversations import converse, differences, hit_rates
from tests.e2e.drafts import KINDS, Drafting
from tests.fixtures.zygote import Zygote

# tiny models are made for fewer tokens than a line may ask for
CHECKS = {**STRICT_CHECKS, **RANKS, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
TRAFFIC = Traffic(conversations=6, rounds=3, seed=7)
# see test_fp8.py
ROUNDED = Traffic(conversations=6, rounds=3, parallel=1, seed=30)
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
PAGE_64 = ("--page-size", "64")


class Line(NamedTuple):
    """What a server is started with.

    Attributes:
        kind: the model and its drafts.
        options: of the line, for the server without a cache too.
        host: its host tier.
        tokens: size of the device pool: conversations come back from the host.
    """

    kind: Drafting
    options: tuple[str, ...] = ()
    host: tuple[str, ...] = HOST
    tokens: int = 1536
    traffic: Traffic = TRAFFIC


def plain(name: str) -> Drafting:
    """A model without drafts."""
    return Drafting(lambda: ready_made(name), ())


def chain(kind: Drafting, steps: int) -> Drafting:
    """The same with as many draft tokens one behind the other."""
    lengths = ("--speculative-num-steps", str(steps), "--speculative-num-draft-tokens")
    return kind._replace(options=(*kind.options, *lengths, str(steps + 1)))


LINES = {
    "sglang pull 23391, gpt-oss-120b": Line(
        plain("gpt-oss"),
        PAGE_64,
        (*HOST[:1], "--hicache-ratio", "2.0", "--hicache-write-policy", "write_through"),
    ),
    "sglang issue 24869, Gemma 4": Line(
        plain("gemma-4"),
        (*PAGE_64, "--kv-cache-dtype", "fp8_e4m3"),
        (
            *(*HOST[:1], "--hicache-ratio", "1", "--hicache-mem-layout", "page_first"),
            *("--hicache-write-policy", "write_through_selective"),
        ),
        tokens=2048,
        traffic=ROUNDED,
    ),
    "cookbook, gpt-oss with EAGLE3": Line(KINDS["eagle3"]),
    "cookbook, Gemma 4 with its assistant": Line(chain(KINDS["gemma-4"], 5)),
    "cookbook, MiMo-V2.5 on B200": Line(KINDS["mimo-v2"]),
    "cookbook, MiMo-V2.5-Pro": Line(
        KINDS["mimo-v2"], ("--swa-full-tokens-ratio", "0.1"), tokens=8192
    ),
    "cookbook, Step-3.5-Flash": Line(plain("step-3.5"), ("--ep", "2")),
    "cookbook, Step-3.5-Flash with MTP": Line(KINDS["step-3.5"]),
    "cookbook, Llama 4 Scout": Line(plain("llama-4"), ("--context-length", "1000000")),
}


FEW = ("sglang pull 23391, gpt-oss-120b",)
"""The line that this cache was first asked for; the others are with the whole matrix."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in LINES],
)
def test_a_line(zygote: Zygote, tmp_path: Path, name: str) -> None:
    line = LINES[name]
    both = [*COMMON, "--tp", "2", *line.options]
    without = [*line.kind.without(), *both, "--disable-radix-cache", "--max-total-tokens", "16384"]
    with zygote.running(without, tmp_path / "without.log", CHECKS) as server:
        expected = converse(server, line.traffic)
    ours = [*line.kind.arguments(), *both, *OURS, *line.host]
    ours += ["--max-total-tokens", str(line.tokens)]
    with zygote.running(ours, tmp_path / "ours.log", CHECKS) as server:
        answers = converse(server, line.traffic)
        assert_idle_and_alive(server)
    assert not differences(answers, expected)
    assert hit_rates(answers)["host_share"] > 0
