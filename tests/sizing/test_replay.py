"""Replays against what can be worked out by hand."""

from collections.abc import Iterable

import numpy as np
import pytest

from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.planning.model import PRESETS, ModelShape
from sglang_ext.sizing.replay import Budget, Replay
from sglang_ext.sizing.traffic import Chat, Tokens, interleave

MODEL = ModelShape(2, 2, window=33, kv_heads=1, head_dim=8)
CHAT = Chat(sessions=12, rounds=5, system=50, first=(60, 200), question=(5, 60), answer=(1, 90))
ROOMY = 4000


def requests() -> list[tuple[Tokens, Tokens]]:
    return list(interleave(CHAT, CHAT.sessions, 500, seed=2))


def replay(
    budget: Budget, policy: WritePolicy = WritePolicy.WRITE_THROUGH, page: int = 16
) -> Replay:
    cache = Replay(MODEL, budget, policy, page, chunk=64)
    for prompt, answer in requests():
        cache.serve(prompt, answer)
    return cache


def common_prefix(one: Tokens, other: Tokens) -> int:
    shortest = min(len(one), len(other))
    differs = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(differs[0]) if len(differs) else shortest


def reusable(all_requests: Iterable[tuple[Tokens, Tokens]], page: int) -> int:
    """Tokens of whole pages that an earlier request has computed; one is left to compute."""
    total, seen = 0, []
    for prompt, answer in all_requests:
        best = max((common_prefix(prompt[:-1], earlier) for earlier in seen), default=0)
        total += best // page * page
        seen.append(np.concatenate((prompt, answer)))
    return total


@pytest.mark.parametrize("page", [1, 16, 64])
def test_without_pressure_everything_is_found_on_the_device(page: int) -> None:
    result = replay(Budget(ROOMY, ROOMY, 0), page=page).result()
    everything = reusable(requests(), max(page, 16))
    assert result.from_device + result.again == everything
    # where only a part of an earlier prompt is repeated its window may be gone
    assert result.again <= 0.02 * everything
    assert (result.from_host, result.rejected, result.written_bytes) == (0, 0, 0)
    assert result.prompt == sum(len(prompt) for prompt, _ in requests())


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_a_large_host_makes_up_for_a_small_device(policy: WritePolicy) -> None:
    small = replay(Budget(90, 60, 0), policy).result()
    tiered = replay(Budget(90, 60, 100_000_000), policy).result()
    everything = replay(Budget(ROOMY, ROOMY, 0)).result()
    assert small.hit_rate < 0.8 * everything.hit_rate
    assert tiered.hit_rate > 0.97 * everything.hit_rate
    assert tiered.from_host > 0
    page = MODEL.full_token_bytes * 16
    assert tiered.loaded_bytes >= tiered.from_host // 16 * page
    assert tiered.written_bytes > 0


def test_what_does_not_fit_the_device_is_counted_and_leaves_nothing_behind() -> None:
    cache = replay(Budget(4, 4, 0))
    assert cache.result().rejected > 0
    table = cache.index.table
    assert table.device.n_locked == table.swa_device.n_locked == 0
    cache.index.evict_device(4, 4)
    assert cache.index.device_pool.free_pages() == 4
    assert cache.index.device_pool.free_window_pages() == 4


def test_sizes_of_known_models() -> None:
    # 2 (K and V) x 18 layers x 8 heads x 64 x 2 bytes
    assert PRESETS["gpt-oss-120b"].full_token_bytes == 36_864
    assert PRESETS["gemma-4-31b"].swa_token_bytes == 2 * 50 * 16 * 256 * 2


@pytest.mark.parametrize("field", ["full_layers", "swa_layers", "window", "kv_heads", "head_dim"])
def test_an_impossible_model_is_refused(field: str) -> None:
    shape = {"full_layers": 1, "swa_layers": 1, "window": 2, "kv_heads": 1, "head_dim": 1}
    with pytest.raises(ValueError, match=field):
        ModelShape(**{**shape, field: 0})
