"""The test of what loops are held to: bugs in them must be found by the seeded traffic.

Where all ranks have the bug, the model finds it. Where it is in what is compiled alone, ranks
differ.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_ext.core.compiled import candidates, loops, slots
from sglang_ext.core.compiled.arrays import columns
from sglang_ext.core.compiled.constants import EMPTY_BUCKET
from sglang_ext.core.compiled.loop_sets import COMPILED
from sglang_ext.core.device.demotion import Demotion
from sglang_ext.testing.interpreted import INTERPRETED
from tests.core.test_seeded_bugs import PATHS, Patch, run_all_seeds


def windows_where_prefixes_branch_off_are_not_used(patch: Patch) -> None:
    original = PATHS._use

    def use(c: Any, rows: Any, *args: int) -> None:
        children = c.children[rows]
        c.children[rows] = np.minimum(children, 1)
        original(c, rows, *args)
        c.children[rows] = children

    patch.setattr(PATHS, "_use", use)


def windows_inside_a_prompt_are_further_apart(patch: Patch) -> None:
    original = PATHS.resume_points

    def points(marked: Any, complete: Any, interval: int, keep: Any) -> None:
        original(marked, complete, interval + (interval > 0), keep)

    patch.setattr(PATHS, "resume_points", points)


def windows_inside_a_prompt_stay_worthless(patch: Patch) -> None:
    patch.setattr(PATHS, "_UNUSED_TO_INSIDE", 0)


def later_victims_are_in_no_order(patch: Patch) -> None:
    original = candidates.first_of

    def first_of(state: int, number: int, out: Any) -> None:
        original(state, number, out)
        out[1:] = out[1:][::-1].copy()

    patch.setattr(candidates, "first_of", first_of)


def what_is_noted_last_is_not_looked_at(patch: Patch) -> None:
    original = candidates.settle
    patch.setattr(candidates, "settle", lambda state, noted: original(state, noted[:-1]))


def what_is_noted_first_is_no_victim_without_a_host(patch: Patch) -> None:
    original = candidates.settle_victims
    patch.setattr(candidates, "settle_victims", lambda state, noted: original(state, noted[1:]))


def a_look_ends_a_page_too_early(patch: Patch) -> None:
    original = Demotion.look_ahead
    patch.setattr(
        Demotion, "look_ahead", lambda self, *args: original(self, *args[:-1], args[-1] - 1)
    )


def half_a_window_is_worth_saving(patch: Patch) -> None:
    original = candidates.windows_to_save
    patch.setattr(
        candidates,
        "windows_to_save",
        lambda *args: original(*args[:5], max(1, args[5] - 1), *args[6:]),
    )


def siblings_on_the_device_are_not_preferred(patch: Patch) -> None:
    original = PATHS.inside_of

    def inside(c: Any, *args: Any) -> Any:
        return original(c._replace(device=np.zeros_like(c.device)), *args)

    patch.setattr(PATHS, "inside_of", inside)
    patch.setattr(INTERPRETED.siblings, "inside_of", inside)


def rows_between_those_of_a_run_are_believed_to_be_in_it(patch: Patch) -> None:
    def follow(rows: Any, begin: int, end: int) -> bool:
        return bool(rows[end - 1] - rows[begin] == end - 1 - begin)

    patch.setattr(INTERPRETED.slots, "_follow_one_another", follow)


def a_first_page_that_leaves_still_counts(patch: Patch) -> None:
    original = PATHS.count_begin

    def count(c: Any, parent: int, row: int, change: int) -> None:
        original(c, parent, row, max(0, change))

    patch.setattr(PATHS, "count_begin", count)


def a_beginning_is_counted_by_its_whole_page(patch: Patch) -> None:
    original = INTERPRETED.siblings.begin_of

    def begin(c: Any, parent: int, pages: Any, number: int) -> Any:
        return original(c._replace(device_page=c.weights.size, overlap=0), parent, pages, number)

    patch.setattr(INTERPRETED.siblings, "begin_of", begin)


BUGS: list[Callable[[Patch], None]] = [
    a_first_page_that_leaves_still_counts,
    a_beginning_is_counted_by_its_whole_page,
    windows_where_prefixes_branch_off_are_not_used,
    windows_inside_a_prompt_are_further_apart,
    windows_inside_a_prompt_stay_worthless,
    later_victims_are_in_no_order,
    what_is_noted_last_is_not_looked_at,
    what_is_noted_first_is_no_victim_without_a_host,
    a_look_ends_a_page_too_early,
    half_a_window_is_worth_saving,
    siblings_on_the_device_are_not_preferred,
    rows_between_those_of_a_run_are_believed_to_be_in_it,
]


@pytest.mark.parametrize("seed_bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_model_finds_the_bug(
    seed_bug: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_bug(monkeypatch)
    with pytest.raises(AssertionError):
        run_all_seeds(INTERPRETED)


def a_compiled_lock_leaves_out_the_last_page(patch: Patch) -> None:
    original = slots.lock
    patch.setattr(slots, "lock", lambda *state: original(*state[:3], state[3][:-1]))


def a_compiled_copy_is_not_counted(patch: Patch) -> None:
    original = slots.put

    def put(*args: Any) -> None:
        counts = args[4].copy()
        original(*args)
        args[4][1] = counts[1]

    patch.setattr(slots, "put", put)


def a_compiled_search_leaves_gaps(patch: Patch) -> None:
    original = loops.remove

    def remove(table: int, rows: Any, roots: Any) -> int:
        buckets = columns(table).buckets
        left = buckets.copy()
        held = (left & np.uint64(0xFFFFFFFF)).astype(np.int64)
        left[np.isin(held, rows)] = EMPTY_BUCKET
        first = original(table, rows, roots)
        buckets[:] = left
        return int(first)

    patch.setattr(loops, "remove", remove)


def a_compiled_match_takes_half_a_window(patch: Patch) -> None:
    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def match(*args: Any) -> Any:
            *head, window, out = args
            return original(*head, max(1, window - 1), out)

        return match

    for name in ("match", "match_and_use"):
        patch.setattr(loops, name, patched(getattr(loops, name)))


def a_compiled_use_forgets_branches(patch: Patch) -> None:
    original = loops.use

    def use(table: int, rows: Any, *args: int) -> None:
        children = columns(table).children
        before = children[rows]
        children[rows] = np.minimum(before, 1)
        original(table, rows, *args)
        children[rows] = before

    # loops that use a path themselves
    def match_and_use(
        table: int, pages: Any, root: int, seed: int, tick: int, policy: int, window: int, out: Any
    ) -> Any:
        found = loops.match(table, pages, root, seed, window, out)
        if found[1]:
            use(table, out[: found[1]], tick, policy, window)
        return found

    def record(table: int, rows: Any, request: int, priority: int, *args: int) -> None:
        tick, policy, window, interval = args
        loops.count_request(table, rows, request, priority)
        use(table, rows, tick, policy, window)
        loops.mark_resume_points(columns(table), rows, window, interval)

    for bug in (use, match_and_use, record):
        patch.setattr(loops, bug.__name__, bug)


def a_compiled_match_cuts_too_little_off(patch: Patch) -> None:
    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def match(*args: Any) -> Any:
            *found, cut = original(*args)
            return *found, cut // 2

        return match

    for name in ("match", "match_and_use"):
        patch.setattr(loops, name, patched(getattr(loops, name)))


COMPILED_BUGS: list[Callable[[Patch], None]] = [
    a_compiled_lock_leaves_out_the_last_page,
    a_compiled_copy_is_not_counted,
    a_compiled_search_leaves_gaps,
    a_compiled_match_takes_half_a_window,
    a_compiled_use_forgets_branches,
    a_compiled_match_cuts_too_little_off,
]


@pytest.mark.parametrize("seed_bug", COMPILED_BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds_the_bug_in_what_is_compiled(
    seed_bug: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_bug(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        run_all_seeds(COMPILED, INTERPRETED)
