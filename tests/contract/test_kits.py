"""No kit of the engine's wheel is left out: it runs here, or the reason is written down."""

import json

from tests.conftest import ROOT
from tests.kits import registry, table
from tests.kits.conftest import complaint, everything


def test_every_kit_runs_or_has_a_reason() -> None:
    runs = {(kit.module, test) for kit in registry.RUN for test in kit.tests}
    reasons = set(registry.CANNOT)
    tests = {
        (file.stem, test)
        for file in registry.folder().glob("*.py")
        for _, test in registry.tests_of(file)
    }
    modules = {file.stem for file in registry.folder().iterdir() if file.stem[0] != "_"}
    # functions, not classes with tests
    modules -= {"radix_cache_server_kit", "cache_hit_kit"}
    left_out = {one for one in tests if one not in runs | reasons and (one[0], "*") not in reasons}
    assert not left_out
    known = {module for module, _ in tests | reasons}
    assert modules <= known
    gone = {one for one in runs | reasons if one[1] != "*"} - tests
    assert gone == {
        ("radix_cache_server_kit", "test_radix_attention"),
        ("cache_hit_kit", "test_multiturn_cache_hit"),
    }
    assert not runs & reasons


def test_the_default_selection_has_each_page_tier_and_policy() -> None:
    """Without what is marked as full."""
    chosen = {
        (cell, kit.name) for cell, kit, test in everything() if registry.selected(cell, kit, test)
    }
    cells = {cell for cell, _ in chosen - registry.FULL}
    assert {name for _, name in chosen - registry.FULL} == {name for _, name in chosen}
    assert {cell.page for cell in cells} == {1, 16, 64}
    assert {cell.tier for cell in cells} == {"device", "host", "storage"}
    assert {cell.policy for cell in cells} == {
        "write_through",
        "write_through_selective",
        "write_back",
    }


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads((ROOT / "docs" / "kits.json").read_text())
    assert (ROOT / "docs" / "kits.md").read_text() == table.page(results)


def test_a_row_says_what_passed_failed_and_did_not_run() -> None:
    results = {
        "1-device-CacheHit-test_multiturn_cache_hit": {"outcome": "passed", "said": ""},
        "16-host-write_back-CacheHit-test_multiturn_cache_hit": {
            "outcome": "failed",
            "said": "AssertionError: 3 of 4",
        },
    }
    page = table.page(results)
    row = next(line for line in page.splitlines() if "`cache_hit_kit`" in line)
    assert row.split(" | ")[2:6] == ["✓", "···", "···", "·"]
    assert row.split(" | ")[6] == "··✗"
    assert "1 passed, 1 failed." in page
    assert "test_multiturn_cache_hit`: AssertionError: 3 of 4" in page


def test_a_failure_is_named_by_its_innermost_error() -> None:
    report = (
        "E   AssertionError: Traceback (most\nE     AssertionError: 3 of 4\nE   assert not ['Tr"
    )
    assert complaint(report) == "AssertionError: 3 of 4"
    bare = "E   AssertionError: Traceback (most\nE     assert 3 >= 4\nE     AssertionError"
    assert complaint(bare) == "assert 3 >= 4"
    assert complaint("") == ""
