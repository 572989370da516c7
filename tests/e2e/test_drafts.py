"""Speculative decoding on the CPU platform: what drafts is the engine's own, and so is the cache.

Tokens are those of a server without drafts, and what is drafted is the same with stock's host tier
and without: then proposals can be the oracle for a cache that has the KV of drafts on its host.
"""

import contextlib
from pathlib import Path

import pytest

from launch.server import STRICT_CHECKS, ServerError, dp_attention, wait_until_ready
from launch.traffic import Traffic, generate, tokens
from tests.e2e.conftest import COMMON, RANKS, assert_idle_and_alive
from tests.e2e.conversations import converse, differences, hit_rates
from tests.e2e.drafts import KINDS, LOG, TAKEN, Drafted, Drafting, compare, converse_and_draft
from tests.fixtures.zygote import Zygote

# one request at a time: what is computed beside others differs in its last bit
TRAFFIC = Traffic(conversations=4, rounds=3, parallel=1, seed=7)
PAGE = ("--page-size", "16")
ROOM = ("--max-total-tokens", "6144")
TIGHT = ("--max-total-tokens", "1536")
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
FEW = ("ngram",)
"""Drafts without a model. Those of models are compared with tiers in `test_draft_tiers`, and with
stock's cache in the whole matrix."""


def drafted(
    zygote: Zygote, folder: Path, kind: Drafting, *options: str, **environment: str
) -> Drafted:
    """The traffic with a server that drafts."""
    folder.mkdir()
    arguments = [*kind.arguments(), *COMMON, *options]
    variables = {**STRICT_CHECKS, LOG: str(folder / "proposals"), **environment}
    with zygote.running(arguments, folder / "log", variables) as server:
        found = converse_and_draft(server, TRAFFIC, folder / "proposals")
        assert_idle_and_alive(server)
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in KINDS],
)
def test_tokens_are_those_without_drafts(zygote: Zygote, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    plain = [*kind.without(), *COMMON, *PAGE, *ROOM, "--disable-radix-cache"]
    with zygote.running(plain, tmp_path / "plain.log", STRICT_CHECKS) as server:
        expected = converse(server, TRAFFIC)
    found = drafted(zygote, tmp_path / "drafts", kind, *PAGE, *ROOM)
    assert not differences(found.answers, expected)
    assert hit_rates(found.answers)["hit_rate"] > 0
    assert found.proposals
    # random drafts stand by chance, those of the target itself because they are right
    assert name != "standalone" or found.accept_length > 2.0


@pytest.mark.full
@pytest.mark.parametrize("name", ["mimo-v2", "mimo-v2-one", "eagle3"])
def test_drafts_are_those_without_a_host(zygote: Zygote, tmp_path: Path, name: str) -> None:
    """Those drafts whose KV stock keeps on its host: packed into its pages, or beside them."""
    device = drafted(zygote, tmp_path / "device", KINDS[name], *PAGE, *ROOM)
    host = drafted(zygote, tmp_path / "host", KINDS[name], *PAGE, *TIGHT, *HOST)
    assert hit_rates(host.answers)["host_share"] > 0
    assert not differences(host.answers, device.answers)
    comparison = compare(host, device)
    assert comparison.steps > 0
    assert not comparison.different, comparison


@pytest.mark.full
@pytest.mark.parametrize("name", ["mimo-v2", "eagle3"])
def test_drafts_behind_taken_ones(tmp_path: Path, name: str) -> None:
    """Hardly a random draft is taken, and so nothing would be drafted behind several. Here two of
    three are taken, and the answers are the drafts'."""
    with contextlib.closing(Zygote(**TAKEN)) as zygote:
        device = drafted(zygote, tmp_path / "device", KINDS[name], *PAGE, *ROOM)
        host = drafted(zygote, tmp_path / "host", KINDS[name], *PAGE, *TIGHT, *HOST)
    assert hit_rates(host.answers)["host_share"] > 0
    assert host.accept_length == device.accept_length == 3.0
    assert not differences(host.answers, device.answers)
    comparison = compare(host, device)
    assert comparison.steps > 0
    assert not comparison.different, comparison


LAYOUTS = {"tp": lambda: ["--tp", "2"], "dp": lambda: dp_attention(2)}


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_draft_the_same(zygote: Zygote, tmp_path: Path, layout: str) -> None:
    """Each with its heads of a draft, or with its requests; without hits, which DP ranks have of
    their own and which drafts depend on."""
    kind, options = KINDS["mimo-v2"], [*PAGE, *ROOM, "--disable-radix-cache"]
    one = drafted(zygote, tmp_path / "one", kind, *options)
    two = drafted(zygote, tmp_path / "two", kind, *options, *LAYOUTS[layout](), **RANKS)
    assert not differences(two.answers, one.answers)
    comparison = compare(two, one)
    assert comparison.steps > 0
    assert not comparison.different, comparison


@pytest.mark.full
def test_trees_of_a_draft_model_are_refused(zygote: Zygote, tmp_path: Path) -> None:
    trees = ("--speculative-eagle-topk", "2", "--page-size", "1")
    server = zygote.start(
        [*KINDS["standalone"].arguments(), *COMMON, *ROOM, *trees], tmp_path / "log"
    )
    with pytest.raises(
        ServerError, match="eagle-topk 2 is not supported on this platform; allowed: 1"
    ):
        wait_until_ready(server)


@pytest.mark.full
def test_samples_are_the_likeliest_tokens(zygote: Zygote, tmp_path: Path) -> None:
    """Nothing samples from drafts here, and a request that asks for it must not end the server. The
    first token is sampled, for nothing has been drafted then."""
    arguments, prompt = [*KINDS["standalone"].arguments(), *COMMON, *PAGE, *ROOM], tokens(4, 100)
    with zygote.running(arguments, tmp_path / "log", STRICT_CHECKS) as server:
        sampling = {"temperature": 1.0, "max_new_tokens": 16}
        first, *others = generate(server, prompt, 16, sampling_params=sampling)["output_ids"]
        assert generate(server, [*prompt, first], 15)["output_ids"] == others
        assert_idle_and_alive(server)


@pytest.mark.full
def test_trees_of_drafts(zygote: Zygote, tmp_path: Path) -> None:
    """With pages of one token several drafts can follow one token. A tree that is read as a chain
    gives other tokens."""
    kind = KINDS["ngram"]
    trees = ("--speculative-ngram-max-bfs-breadth", "4", "--speculative-num-draft-tokens", "8")
    prompt = tokens(3, 40) * 6
    answers = []
    for options in (kind.without(), [*kind.arguments(), *trees]):
        arguments = [*options, *COMMON, *ROOM, "--page-size", "1"]
        with zygote.running(arguments, tmp_path / "log", STRICT_CHECKS) as server:
            # what it has said once it drafts, and then it has a choice
            answers.append([generate(server, prompt, 64)["output_ids"] for _ in range(3)])
            assert_idle_and_alive(server)
    assert answers[0] == answers[1]
