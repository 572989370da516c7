"""State machine over the index, beside the model; see sglang_ext/testing/machine.py."""

from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from sglang_ext.testing.machine import IndexMachine

WANTED = {
    *("load", "backup", "demotion"),
    *("demoted_pages", "dropped_pages", "dropped_window_pages", "loaded_window_pages"),
    *("abandoned_transfers", "failed_transfers"),
    *("declined_host_full", "declined_host_window_full", "declined_backlog"),
}
"""Rules that never get into trouble prove nothing."""


def run(examples: int, number: int) -> None:
    """The same examples of a number every time: new ones are for the long run."""
    budget = settings(
        max_examples=examples,
        stateful_step_count=60,
        deadline=None,
        derandomize=False,
        database=None,
    )
    run_state_machine_as_test(seed(number)(IndexMachine), settings=budget)


def test_the_index_does_what_the_model_does(full: bool) -> None:
    """Without ``--full`` by the hundred, until all trouble was met: what is drawn depends on which
    modules have been imported."""
    if full:
        run(500, 0)
    else:
        for number in range(5):
            run(100, number)
            if IndexMachine.seen >= WANTED:
                break
    assert IndexMachine.seen >= WANTED, f"never reached: {WANTED - IndexMachine.seen}"
