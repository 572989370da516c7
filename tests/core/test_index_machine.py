"""State machine over the index, beside the model; see sglang_ext/testing/machine.py."""

from hypothesis import settings

from sglang_ext.testing.machine import IndexMachine

# the same examples every time: new ones are for the long run
IndexMachine.TestCase.settings = settings(
    max_examples=500, stateful_step_count=60, deadline=None, derandomize=True
)
TestIndexMachine = IndexMachine.TestCase


def test_rare_transitions_were_reached() -> None:
    """Rules that never get into trouble prove nothing."""
    wanted = {
        *("load", "backup", "demotion", "host allocation failed"),
        *("demoted_pages", "dropped_pages", "dropped_window_pages", "loaded_window_pages"),
        *("abandoned_transfers", "failed_transfers"),
        *("declined_host_full", "declined_host_window_full", "declined_backlog"),
    }
    assert wanted <= IndexMachine.seen, f"never reached: {wanted - IndexMachine.seen}"
