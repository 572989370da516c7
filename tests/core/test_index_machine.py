"""State machine over the index, beside the model; see sglang_ext/testing/machine.py."""

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from sglang_ext.testing.machine import IndexMachine


def test_the_index_does_what_the_model_does(full: bool) -> None:
    """The same examples every time: new ones are for the long run. Rules that never get into
    trouble prove nothing."""
    few = settings(max_examples=160, stateful_step_count=60, deadline=None, derandomize=True)
    budget = settings(few, max_examples=500) if full else few
    run_state_machine_as_test(IndexMachine, settings=budget)
    wanted = {
        *("load", "backup", "demotion"),
        *("demoted_pages", "dropped_pages", "dropped_window_pages", "loaded_window_pages"),
        *("abandoned_transfers", "failed_transfers"),
        *("declined_host_full", "declined_host_window_full", "declined_backlog"),
    }
    assert wanted <= IndexMachine.seen, f"never reached: {wanted - IndexMachine.seen}"
