"""With the engine patched instead of hooked, every token is the same."""

from pathlib import Path
from typing import Any

from launch.models import step as step_model
from launch.server import CPU, STRICT_CHECKS, running
from launch.traffic import Traffic
from sglang_ext.patches import cli
from sglang_ext.patches.patch_set import series
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import Answer, converse, differences, hit_rates
from tests.fixtures.zygote import Zygote
from tests.patches.trees import copy_engine, python_path

TRAFFIC = Traffic(conversations=6, rounds=4, seed=5)


def test_all_patches_give_the_same_tokens_as_none(zygote: Zygote, tmp_path: Path) -> None:
    """With Step-3.5, the model that needs all of them."""
    root = copy_engine(tmp_path / "engine")
    assert cli.main(["apply", "--root", str(root)]) == 0
    model = step_model.make(tmp_path / "model", window=100)

    def answers(name: str, start: Any, **environment: str) -> tuple[list[Answer], str]:
        options = ["--model-path", str(model), *COMMON, "--page-size", "16"]
        options += ["--max-total-tokens", "2048", "--hicache-ratio", "2"]
        # the toggle, not the option: selecting the cache is our part in resolving options
        variables = {**CPU, **STRICT_CHECKS, "SGLANG_EXT_SWA_HICACHE": "1", **environment}
        log = tmp_path / f"{name}.log"
        with start(options, log, variables) as server:
            given = converse(server, TRAFFIC)
            assert_idle_and_alive(server)
        return given, log.read_text()

    said = "sglang-ext: patches of the engine in place of hooks: "
    hooked, log = answers("hooked", zygote.running)
    assert said not in log
    patched, log = answers("patched", running, PYTHONPATH=python_path(root))
    assert log.count(said + ", ".join(patch.name for patch in series())) == 1
    assert not differences(patched, hooked)
    assert hit_rates(patched)["host_share"] > 0
