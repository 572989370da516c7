"""The architectures that are served, with their own kinds of layers, heads, widths and windows.

Both servers could be wrong in the same way, so an answer of the one without a cache is compared
with Hugging Face's model of the same weights too.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.metrics import metric
from launch.models.architectures import MAKERS, ready_made
from launch.server import OURS
from launch.traffic import Traffic
from sglang_ext.planning.launch_line import parse
from sglang_ext.planning.model_config import architecture, draft_of, find, load, shape_of
from sglang_ext.planning.plan import Plan
from tests.e2e.conftest import COMMON, beside_no_cache, with_host_tier, without_cache
from tests.e2e.conversations import Answer, differences, hit_rates
from tests.e2e.drafts import KINDS, Drafting
from tests.fixtures.zygote import Zygote

SHORT = Traffic(conversations=5, rounds=3, seed=5)
LONG = Traffic(conversations=8, rounds=5, seed=6)
# room for a few conversations and no more: the others come back from the host
TIGHT = ("--max-total-tokens", "1536")
BOTH = ("--max-total-tokens", "6144")


def mimo_v2(model: Path) -> Any:
    """Hugging Face's own configuration has other names for the same things, and one token less in
    a window: the engine's reads so many tokens before a token, and not with it."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    from launch.models import mimo_v2

    named = mimo_v2.config()
    kinds = ["sliding_attention" if window else "full_attention" for window in mimo_v2.WINDOWS]
    partial = named["partial_rotary_factor"]
    named |= {
        "sliding_window": mimo_v2.WINDOW + 1,
        "layer_types": kinds,
        "mlp_layer_types": ["dense"] * len(kinds),
        "rms_norm_eps": named["layernorm_epsilon"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
            for kind, theta in (
                ("full_attention", named["rope_theta"]),
                ("sliding_attention", named["swa_rope_theta"]),
            )
        },
    }
    return MiMoV2FlashForCausalLM.from_pretrained(
        model, config=MiMoV2FlashConfig(**named), attn_implementation="eager"
    )


def named(architecture: str) -> Callable[[Path], Any]:
    def load(model: Path) -> Any:
        import transformers

        kind = getattr(transformers, architecture)
        return kind.from_pretrained(model, attn_implementation="eager")

    return load


HUGGING_FACE: dict[str, Callable[[Path], Any]] = {
    "gpt-oss": named("GptOssForCausalLM"),
    "mimo-v2": mimo_v2,
    "gemma-4": named("Gemma4ForConditionalGeneration"),
    "llama-4": named("Llama4ForConditionalGeneration"),
}


def said_by(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, ...]:
    """What the model says after the prompt and each beginning of the answer."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits
    return tuple(logits[0, len(prompt) - 1 :].argmax(dim=-1).tolist())


FEW = ("gpt-oss",)
"""It has sinks and experts; the others have their place in the whole matrix."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in MAKERS],
)
def test_tokens_are_those_of_the_model(zygote: Zygote, tmp_path: Path, name: str) -> None:
    model = ready_made(name)
    answers, expected = beside_no_cache(zygote, model, tmp_path, SHORT, 16, list(TIGHT), both=BOTH)
    assert not differences(answers, expected)
    assert hit_rates(answers)["host_share"] > 0
    stock = HUGGING_FACE[name](model)
    for first in (answer for answer in expected if answer.round == 0):
        prompt = next(SHORT.session(first.conversation)).prompt.tolist()
        assert said_by(stock, prompt, first.output) == first.output


def _undrafted(name: str) -> Drafting:
    return Drafting(lambda: ready_made(name), ())


@pytest.mark.parametrize(
    "model",
    [
        *(
            pytest.param(_undrafted(name), marks=[] if name in FEW else pytest.mark.full, id=name)
            for name in MAKERS
        ),
        pytest.param(KINDS["eagle3"], id="gpt-oss with EAGLE3"),
        pytest.param(KINDS["llama-4"], id="llama-4 with EAGLE3", marks=pytest.mark.full),
    ],
)
def test_bytes_and_tokens_are_as_planned(zygote: Zygote, tmp_path: Path, model: Drafting) -> None:
    """What ``sglang-ext plan`` says of a launch line is what a server of that line allocates: by
    its metrics, and by the table that it logs of the pools that it has made."""
    options = [*model.arguments(), "--page-size", "16", "--hicache-ratio", "2", *BOTH]
    line = parse([*options, "--dtype", "float32"], "test")
    config = load(find(str(line.model)))
    shape = shape_of(config, line.dtype, line.kv_cache_dtype)
    plan = Plan.of(architecture(config), shape, line, draft=draft_of(line))
    assert plan.pools is not None
    tier = [*OURS, "--enable-hierarchical-cache", "--enable-metrics"]
    with zygote.running([*COMMON, *tier, *options], tmp_path / "server.log", {}) as server:
        metrics, log = server.get("/metrics"), server.log.read_text()
    allocated = metric(metrics, "sglang_ext:host_memory_bytes")
    assert plan.host.bytes == pytest.approx(allocated, rel=0.01)
    assert plan.pools.full_tokens == metric(metrics, "sglang:max_total_num_tokens")
    assert plan.pools.swa_tokens == metric(metrics, "sglang:max_total_num_tokens_swa")
    table = dict(re.findall(r"^  (\S+(?: \S+)*)  +(\S.*)$", log, re.MULTILINE))
    for row, said in plan.host.rows(line.ranks):
        assert table[row] == said


@pytest.fixture(scope="module")
def expected(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Answer]]:
    """Answers to the long traffic by name of the model: pages and policies matter to a cache
    alone."""

    @functools.cache
    def of(name: str) -> list[Answer]:
        logs = tmp_path_factory.mktemp("expected")
        return without_cache(zygote, ready_made(name), logs, LONG, *BOTH)

    return of


@pytest.mark.full
@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("policy", ["write_through", "write_back"])
@pytest.mark.parametrize("name", MAKERS)
def test_pages_and_policies(
    zygote: Zygote,
    tmp_path: Path,
    expected: Callable[[str], list[Answer]],
    name: str,
    policy: str,
    page: int,
) -> None:
    tier = [*TIGHT, "--hicache-write-policy", policy, "--chunked-prefill-size", "256"]
    tier += ["--page-size", str(page)]
    answers = with_host_tier(zygote, ready_made(name), tmp_path, LONG, *tier)
    assert not differences(answers, expected(name))
    rates = hit_rates(answers)
    assert rates["hit_rate"] > 0.2, rates
    assert rates["host_share"] > 0, rates
