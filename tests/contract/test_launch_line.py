"""Options that we read of a launch line are the engine's, by its names and with its defaults."""

import argparse
import dataclasses

import pytest

from sglang_ext.planning import launch_line
from sglang_ext.planning.launch_line import LaunchLine

OURS_ONLY = {"others"}
RESOLVED_LATER = {"page_size": 1, "hicache_ratio": 2.0}
"""Options that the engine decides on when nothing is said, and what it then takes."""


@pytest.fixture(scope="module")
def engine() -> dict[str, argparse.Action]:
    """The engine's options by flag."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {flag: action for action in parser._actions for flag in action.option_strings}


def ours() -> list[argparse.Action]:
    """Options that we read."""
    parser = argparse.ArgumentParser(add_help=False)
    launch_line.add_options(parser)
    return parser._actions


@pytest.mark.parametrize("action", ours(), ids=lambda action: action.dest)
def test_an_option_is_the_engine_s(
    action: argparse.Action, engine: dict[str, argparse.Action]
) -> None:
    theirs = engine[action.option_strings[0]]
    # people write the beginning of a name, which the engine takes as well
    short = {flag for flag in action.option_strings if flag not in engine}
    assert set(theirs.option_strings) == {*action.option_strings} - short
    for flag in short:
        assert [name for name in engine if name.startswith(flag)] == [f"{flag}-size"]
    assert (theirs.nargs == 0) == (action.nargs == 0)
    default = getattr(LaunchLine(), action.dest)
    assert (theirs.default or RESOLVED_LATER.get(action.dest, theirs.default)) == default


def test_every_field_has_its_option() -> None:
    fields = {field.name for field in dataclasses.fields(LaunchLine)}
    assert fields - OURS_ONLY == {action.dest for action in ours()}
