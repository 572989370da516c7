"""Launch lines of known models: the engine takes every word, and every figure is computed."""

import pytest

from launch import presets_page
from sglang_ext.planning import preset
from sglang_ext.planning.launch_line import take_apart
from sglang_ext.planning.model import COMPRESSED, PRESETS
from tests.conftest import ROOT
from tests.fixtures.launch_lines import problems
from tests.fixtures.zygote import Zygote

MODELS = {
    "deepseek-v4-flash",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "gemma-4-31b",
    "llama-4-scout",
    "mimo-v2-flash",
    "step-3.5-flash",
}


def test_the_page_is_what_the_presets_say() -> None:
    assert (ROOT / "docs" / "presets.md").read_text() == presets_page.page()


def test_every_model_has_one_and_the_pull_request_two() -> None:
    others = {name for name in preset.names() if name not in MODELS}
    assert others == {"gpt-oss-120b-pull-23391", "gemma-4-31b-issue-24869"}
    assert {preset.load(name).shape for name in MODELS} == MODELS
    assert {*PRESETS, *COMPRESSED} >= MODELS


def test_the_engine_takes_every_word(zygote: Zygote) -> None:
    names = preset.names()
    found = problems(zygote, [preset.load(name).words() for name in names])
    assert dict(zip(names, found, strict=True)) == {name: [] for name in names}


def test_a_word_that_the_engine_does_not_take_is_found(zygote: Zygote) -> None:
    words = preset.load("gpt-oss-20b").words()
    wrong = (["--hicache-sise", "1"], ["--attn-cp-size", "2"])
    found = problems(zygote, [*([*words, *more] for more in wrong), ["SGLANG_HICACHE=1", *words]])
    assert "--hicache-sise" in found[0][0]
    assert "--attn-cp-size" in found[1][0]
    assert found[2] == ["SGLANG_HICACHE is not known"]


@pytest.mark.parametrize("name", preset.names())
def test_a_preset_says_why_and_holds_no_figure(name: str) -> None:
    known = preset.load(name)
    variables, options = take_apart(known.words())
    assert variables["SGLANG_EXT_SWA_HICACHE"] == "1"
    assert len([word for word in options if word.startswith("--")]) + len(variables) == len(
        known.part
    ), "a reason for each"
    assert all(part.why.endswith(".") for part in known.part)
