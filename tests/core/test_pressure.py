"""Nothing that the host has room for is lost: prefixes on a device that a few requests fill."""

import numpy as np
import pytest

from sglang_ext.core.write_policy import WritePolicy
from tests.core.scheduler import Scheduler

GROUPS, BRANCHES, ANSWER = 3, 3, 512
POLICIES = [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK]


@pytest.mark.parametrize(("page", "seed"), [(16, 0), (64, 1), (64, 2)])
def test_a_turn_finds_all_of_the_turn_before(page: int, seed: int) -> None:
    """Nine conversations with long answers end together on a device that holds five; the host
    holds them all. The traffic of a test in SGLang's kit for unified caches."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(page, tokens=12_000, ratio=3, write=WritePolicy.WRITE_THROUGH, seed=seed)
    prefixes = [rng.integers(0, 30_000, 512) for _ in range(GROUPS)]
    conversations = [
        np.concatenate((prefix, rng.integers(0, 30_000, 256 + 64 * branch + ANSWER)))
        for branch in range(BRANCHES)
        for prefix in prefixes
    ]
    for turn, more in enumerate((512, 256, 0)):
        for number, tokens in enumerate(conversations):
            scheduler.submit((turn, number), tokens, ANSWER)
        scheduler.run()
        for number, tokens in enumerate(conversations):
            size = scheduler.engine.geometry.page_tokens
            whole = (len(tokens) - 1) // size * size
            tail = rng.integers(0, 30_000, more + ANSWER)
            conversations[number] = np.concatenate((tokens, tail))
            if turn < 2:
                scheduler.found[turn + 1, number, "reusable"] = whole
    lost = {
        key: (scheduler.found[key[:2]], reusable)
        for key, reusable in scheduler.found.items()
        if len(key) == 3 and scheduler.found[key[:2]] < reusable
    }
    assert not lost, lost


@pytest.mark.parametrize("write", POLICIES)
@pytest.mark.parametrize("page", [16, 64])
def test_a_full_host_takes_in_what_a_few_long_prompts_leave(page: int, write: WritePolicy) -> None:
    """Two prompts fill the device, five the host, twelve come; the last ones are there again."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(page, tokens=4096, ratio=2, write=write)
    prompts = [rng.integers(0, 30_000, 1700 + 16) for _ in range(12)]
    for number, tokens in enumerate(prompts):
        scheduler.submit(number, tokens, 16)
        scheduler.run()
    for number in (11, 10, 9, 8):
        scheduler.submit(("again", number), prompts[number], 16)
        scheduler.run()
    whole = 1699 // page * page
    found = sum(scheduler.found["again", number] for number in (11, 10, 9, 8))
    # less than 0.81 of it where copies are ahead of a part of the device, whatever steps take
    assert found >= 0.85 * 4 * whole, found


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("write", "share"), zip(POLICIES, (0.8, 0.95), strict=True))
def test_what_ends_together_is_there_again_on_a_large_full_host(
    write: WritePolicy, share: float, seed: int
) -> None:
    """Eight conversations hold most of the device and end at once. What they leave has to be on the
    host before the next ones take its place, although that is full of prompts that nobody asks for
    again; and what was copied has to stay there, for its place on the device is gone soon."""
    rng = np.random.default_rng(1 + seed)
    scheduler = Scheduler(64, 16_384, ratio=16, write=write, seed=seed, most_running=8)
    counters, number = scheduler.engine.index.counters, 0
    while scheduler.engine.index.host.free_pages >= 64:
        scheduler.submit(("filler", number := number + 1), rng.integers(0, 30_000, 1025), 1)
        scheduler.run()
    conversations = [rng.integers(0, 30_000, 1280) for _ in range(32)]
    found = reusable = 0
    copied = counters.backed_up_pages
    for turn in range(4):
        for number, before in enumerate(conversations):
            conversations[number] = np.concatenate((before, rng.integers(0, 30_000, 64 + 16)))
            scheduler.submit((turn, number), conversations[number], 16)
            reusable += (len(before) - 1) // 64 * 64 if turn else 0
        scheduler.run()
        found += sum(scheduler.found[turn, number] for number in range(len(conversations)))
    # 0.64 and 0.74, and 0.87 twice, where copies of what is on the device too go before prefixes
    # that nobody asks for, and a copy that is not needed yet takes no room
    assert found >= share * reusable, found / reusable
    pages = sum(len(tokens) // 64 for tokens in conversations)
    # up to three times as many, for copies took each other's place
    assert counters.backed_up_pages - copied <= 1.5 * pages
