"""One part of the bench, as the process that it is."""

import contextlib
import sys
import traceback
from types import ModuleType

from launch.bench.gpu import checks, copies, exact, served
from launch.bench.gpu.record import Record
from launch.bench.gpu.setting import Setting

PARTS: dict[str, ModuleType] = {"exact": exact, "served": served, "copies": copies}


def work(name: str, setting: Setting) -> None:
    """Run a part; its report is on disk, with ``checks`` and ``ok``, and printed as tables.

    A part that fails has a report too: what it had measured by then, and why it failed.
    """
    record = Record(setting.report)
    part = PARTS[name]
    failed = False
    try:
        # bars and warnings; what is printed is the table
        with (setting.logs / "bench.log").open("w") as log, contextlib.redirect_stderr(log):
            part.run(setting, record)
    except Exception as error:  # noqa: BLE001 - what was measured counts, and is printed
        traceback.print_exc()
        record.put(f"{error!r}"[:500], "failed")
        failed = True
    found = checks.judged(part.checks(record.data), setting.device)
    record.put(found, "checks")
    record.put(checks.passes(found) and not failed, "ok")
    print("\n".join([*part.table(record.data), *checks.lines(found)]))
    for what in record.data["left_out"]:
        print(f"left out for want of time: {what}")
    sys.stdout.flush()
