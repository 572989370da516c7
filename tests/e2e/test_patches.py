"""With the engine patched instead of hooked, every token is the same."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.models import step as step_model
from launch.server import CPU, STRICT_CHECKS
from launch.traffic import Traffic
from sglang_ext.patches import cli
from sglang_ext.patches.patch_set import series
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import Answer, converse, differences, hit_rates
from tests.fixtures.zygote import Zygote
from tests.patches.trees import copy_engine, python_path

TRAFFIC = Traffic(conversations=6, rounds=4, seed=5)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A process that has imported the engine with all patches."""
    root = copy_engine(tmp_path_factory.mktemp("engine"))
    assert cli.main(["apply", "--root", str(root)]) == 0
    with contextlib.closing(Zygote(PYTHONPATH=python_path(root))) as process:
        yield process


def test_all_patches_give_the_same_tokens_as_none(
    zygote: Zygote, patched: Zygote, tmp_path: Path
) -> None:
    """With Step-3.5, the model that needs all of them."""
    model = step_model.make(tmp_path / "model", window=100)

    def answers(name: str, engine: Zygote) -> tuple[list[Answer], str]:
        options = ["--model-path", str(model), *COMMON, "--page-size", "16"]
        options += ["--max-total-tokens", "2048", "--hicache-ratio", "2"]
        # the toggle, not the option: selecting the cache is our part in resolving options
        variables = {**CPU, **STRICT_CHECKS, "SGLANG_EXT_SWA_HICACHE": "1"}
        log = tmp_path / f"{name}.log"
        with engine.running(options, log, variables) as server:
            given = converse(server, TRAFFIC)
            assert_idle_and_alive(server)
        return given, log.read_text()

    said = "sglang-ext: patches of the engine in place of hooks: "
    on_hooks, log = answers("hooked", zygote)
    assert said not in log
    on_patches, log = answers("patched", patched)
    assert log.count(said + ", ".join(patch.name for patch in series())) == 1
    assert not differences(on_patches, on_hooks)
    assert hit_rates(on_patches)["host_share"] > 0


def test_pages_come_back_in_host_pools_of_a_patched_engine(patched: Zygote) -> None:
    lines = patched.lines("tests.adapter.arena_views")
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines), lines
