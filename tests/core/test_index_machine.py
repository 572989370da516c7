"""State machine over the index, beside the model; see sglang_ext/testing/machine.py."""

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from sglang_ext.testing.machine import IndexMachine

# the same examples every time: new ones are for the long run
IndexMachine.TestCase.settings = settings(
    max_examples=500, stateful_step_count=60, deadline=None, derandomize=True
)
TestIndexMachine = IndexMachine.TestCase


def test_rare_transitions_were_reached() -> None:
    """Rules that never get into trouble prove nothing."""
    if not IndexMachine.seen:  # the machine ran in another process, or not at all
        run_state_machine_as_test(IndexMachine, settings=IndexMachine.TestCase.settings)
    wanted = {
        *("load", "backup", "demotion"),
        *("demoted_pages", "dropped_pages", "dropped_window_pages", "loaded_window_pages"),
        *("abandoned_transfers", "failed_transfers"),
        *("declined_host_full", "declined_host_window_full", "declined_backlog"),
    }
    assert wanted <= IndexMachine.seen, f"never reached: {wanted - IndexMachine.seen}"
