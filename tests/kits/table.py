"""The table of docs/kits.md, from the results of runs.

python -m pytest tests/kits --all-kits --kits-out out/kits.json
python -m tests.kits.table out/kits.json docs/kits.md
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_ext.arguments import Parser, input_file, input_folder
from tests.kits import cells, registry
from tests.kits.cells import Cell
from tests.kits.registry import Kit

MARKS = {"passed": "✓", "failed": "✗", "": "·"}
HEAD = """# SGLang's own kits

SGLang's wheel has the kits that its own servers are tested with (`sglang.test.kits`). Those that
need no trained model run against servers with this cache, imported from the wheel: `tests/kits`.
`make test` runs a part of each, `make kits` everything, and writes this page from the results.

Every server has 12,000 tokens on the device, and with a host tier three times as much there.
Columns are page size and tier; the three marks of a tier with a host are the write policies
`write_through`, `write_through_selective` and `write_back`. ✓ all tests of the row pass, ✗ one
fails, · not run, - means nothing there: one request leaves nothing in storage with
`write_through_selective` (copies what a second one uses) and `write_back` (copies what is evicted).
* asks for too much there: the reason is below the table.
"""


def columns() -> list[tuple[int, str]]:
    """(page, tier) from left to right."""
    return list(itertools.product(cells.PAGES, cells.TIERS))


def mark(results: Mapping[str, Any], cell: Cell, kit: Kit, tests: Sequence[str]) -> str:
    """One sign for some tests of a kit on one kind of server."""
    if kit.limit(cell) is not None:
        return "*"
    if not kit.means_something(cell):
        return "-"
    outcomes = {
        results.get(f"{cell.name}-{kit.name}-{test}", {"outcome": ""})["outcome"] for test in tests
    }
    return MARKS[next(one for one in ("failed", "", "passed") if one in outcomes)]


def run_rows(results: Mapping[str, Any]) -> Iterator[str]:
    """Rows of what runs: one for the tests of a kit that went alike everywhere."""
    for kit in registry.RUN:
        alike: dict[tuple[str, ...], list[str]] = {}
        for test in kit.tests:
            alike.setdefault(tuple(_row(results, kit, (test,))), []).append(test)
        for row, tests in alike.items():
            named = ", ".join(f"`{test}`" for test in tests)
            yield f"| `{kit.module}` | {named} | {' | '.join(row)} | |"


def _row(results: Mapping[str, Any], kit: Kit, tests: Sequence[str]) -> list[str]:
    return [
        "".join(
            mark(results, cell, kit, tests) for cell in cells.ALL if (cell.page, cell.tier) == at
        )
        if at[1] in kit.tiers
        else ""
        for at in columns()
    ]


def reason_rows() -> Iterator[str]:
    """Rows of what cannot run."""
    empty = " | ".join([""] * len(columns()))
    for (module, test), reason in sorted(registry.CANNOT.items()):
        named = "all" if test == "*" else f"`{test}`"
        yield f"| `{module}` | {named} | {empty} | {reason} |"


def limits() -> Iterator[str]:
    """Why a test asks for too much on some kinds of servers."""
    for kit in registry.RUN:
        for pages, tier, reason in kit.limits:
            sizes = ", ".join(map(str, pages))
            yield f"- * `{', '.join(kit.tests)}`, {tier}, page size {sizes}: {reason}."


def failures(results: Mapping[str, Any]) -> Iterator[str]:
    """What failed, and what it said."""
    for name, result in sorted(results.items()):
        if result["outcome"] == "failed":
            yield f"- `{name}`: {result['said'] or 'no message'}"


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    heads = [f"{size} {tier}" for size, tier in columns()]
    lines = [HEAD, f"| kit | test | {' | '.join(heads)} | why not |"]
    lines += ["|---" * (len(heads) + 3) + "|", *run_rows(results), *reason_rows()]
    lines += ["", *limits()]
    failed = list(failures(results))
    passed = sum(result["outcome"] == "passed" for result in results.values())
    lines += ["", f"{passed} passed, {len(failed)} failed.", *(["", *failed] if failed else [])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Add results to those on record, and write the page anew."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=input_file, nargs="+", help="JSON files of --kits-out")
    parser.add_argument(
        "--docs", type=input_folder, default=Path("docs"), help="folder of kits.json"
    )
    args = parser.parse_args()
    record = args.docs / "kits.json"
    known = {
        f"{cell.name}-{kit.name}-{test}"
        for cell in cells.ALL
        for kit in registry.RUN
        if kit.means_something(cell)
        for test in kit.tests
    }
    results = json.loads(record.read_text()) if record.exists() else {}
    for file in args.results:
        results |= json.loads(file.read_text())
    results = {name: one for name, one in sorted(results.items()) if name in known}
    record.write_text(json.dumps(results, indent=1) + "\n")
    (args.docs / "kits.md").write_text(page(results))


if __name__ == "__main__":
    main()
