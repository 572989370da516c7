"""Who resumes anywhere in a cached prompt computes at most the checkpoint interval again."""

import dataclasses

import numpy as np
import pytest

from sglang_ext.core.table.window import promised
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.planning.model import ModelShape
from sglang_ext.sizing.replay import Budget, Replay

MODEL = ModelShape(4, 4, window=33, kv_heads=2, head_dim=16)
RESUMES = 10_000
PAGE = 16


def resume_anywhere(cache: Replay, resumes: int, seed: int) -> None:
    """Requests that go on from a random place in a prompt that was served before."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 1000, 400)]
    for _ in range(resumes):
        old = prompts[int(rng.integers(len(prompts)))]
        # half of them go on where the prompt ended
        cut = len(old) if rng.random() < 0.5 else int(rng.integers(len(old)))
        prompt = np.concatenate((old[:cut], rng.integers(0, 1000, int(rng.integers(1, 300)))))
        prompt = prompt[-4000:] if len(prompt) > 4000 else prompt
        answer = rng.integers(0, 1000, int(rng.integers(1, 60)))
        cache.serve(prompt, answer)
        prompts = [*prompts[-60:], prompt]


@pytest.mark.parametrize(
    ("host_share", "interval"),
    [
        (0.5, 128),
        (2.0, 512),
        pytest.param(0.5, 512, marks=pytest.mark.full),
        pytest.param(2.0, 128, marks=pytest.mark.full),
    ],
)
def test_a_resume_anywhere_is_bounded(interval: int, host_share: float) -> None:
    page_bytes = (MODEL.full_token_bytes + MODEL.swa_token_bytes) * PAGE
    budget = Budget(600, 480, int(host_share * 600 * page_bytes))
    cache = Replay(
        MODEL, budget, WritePolicy.WRITE_THROUGH, PAGE, chunk=512, checkpoint_tokens=interval
    )
    resume_anywhere(cache, RESUMES // 4, seed=interval)
    result = cache.result()
    assert result.from_host > 0 and cache.index.counters.evicted_host_pages > 0
    assert result.most_again <= interval + PAGE
    assert result.again > 0, "nothing was ever computed again"


def test_with_room_it_is_bounded_where_windows_are_large() -> None:
    """One as large as 24 pages: the distance that is always kept is longer than any prompt."""
    model = dataclasses.replace(MODEL, full_layers=1, swa_layers=8)
    budget = Budget(600, 480, 4 << 30)
    cache = Replay(model, budget, WritePolicy.WRITE_THROUGH, PAGE, chunk=512)
    policy, geometry = cache.index.policy, cache.geometry
    recompute = promised(geometry, policy.checkpoint_pages, policy.dense_pages)
    assert recompute.with_room < 4000 < recompute.always
    assert policy.window_cost == 16
    resume_anywhere(cache, RESUMES // 40, seed=1)
    result = cache.result()
    assert cache.index.counters.evicted_host_window_pages == 0, "the host was full"
    assert 0 < result.most_again <= recompute.with_room + PAGE
