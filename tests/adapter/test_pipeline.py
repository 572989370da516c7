"""Two stages of a pipeline, each a process: the second follows the first."""

import datetime
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from sglang_ext.adapter.pipeline import Stages, refuse_unlike
from sglang_ext.errors import StartupError

GOOD, BAD = [1, 1], [1, 0]
TOLD = [5, 2, *GOOD]
STEPS = 10


def said(work: Callable[[], Any]) -> Any:
    """What it returns, or why it does not."""
    try:
        return work()
    except (AssertionError, RuntimeError, StartupError) as error:
        return str(error)


def first_stage(stages: Stages, folder: Path) -> dict[str, Any]:
    """It begins all of its steps, and then lets the second one begin."""
    found: dict[str, Any] = {"steps": [stages.follow(TOLD, 7, list) for _ in range(STEPS)]}
    (folder / "done").touch()
    for _ in ("late", "failed", "other table"):
        stages.follow(TOLD, 7, list)
    return found


def second_stage(stages: Stages, folder: Path) -> dict[str, Any]:
    """It begins when the first one has ended its steps."""
    while not (folder / "done").exists():
        time.sleep(0.01)
    found: dict[str, Any] = {"steps": [stages.follow(TOLD, 7, list) for _ in range(STEPS)]}
    later = iter(([3, 2, *GOOD], [5, 1, *GOOD], [6, 2, *GOOD]))
    found["late"] = stages.follow([0, 0, *GOOD], 7, lambda: next(later))
    found["looks left"] = len(list(later))
    found["failed"] = said(lambda: stages.follow([5, 2, *BAD], 7, list))
    found["other table"] = said(lambda: stages.follow(TOLD, 8, list))
    return found


def in_stage(folder: Path, stage: int) -> dict[str, Any]:
    """All of it on one stage."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=stage,
        world_size=2,
        timeout=datetime.timedelta(seconds=180),
    )
    stages = Stages(dist.group.WORLD)  # what is on its way goes with it
    found = (first_stage, second_stage)[stage](stages, folder)
    params = SimpleNamespace(pp_cache_group=dist.group.WORLD, pp_size=2)
    found["alike"] = said(lambda: refuse_unlike(params, (100, 50)))
    found["unlike"] = said(lambda: refuse_unlike(params, (100, 50 + stage)))
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each stage has seen."""
    folder = tmp_path_factory.mktemp("stages")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.starmap(in_stage, [(folder, 0), (folder, 1)])


def test_the_first_stage_waits_for_nobody_and_the_second_one_does_the_same(
    stages: list[dict[str, Any]],
) -> None:
    assert [found["steps"] for found in stages] == [[TOLD] * STEPS] * 2


def test_the_second_stage_waits_until_as_much_has_ended_there(stages: list[dict[str, Any]]) -> None:
    assert stages[1]["late"] == TOLD
    assert stages[1]["looks left"] == 0


def test_what_the_second_stage_cannot_follow_is_fatal(stages: list[dict[str, Any]]) -> None:
    assert "a backup has failed on this stage" in stages[1]["failed"]
    assert "stages hold different tables" in stages[1]["other table"]


def test_unlike_stages_are_refused_on_both(stages: list[dict[str, Any]]) -> None:
    for found in stages:
        assert found["alike"] is None
        assert "--pp-size 2: the stages have unlike layers" in found["unlike"]
        assert "[100, 50] to [100, 51]" in found["unlike"]
