"""Memory of the table."""

import resource

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable


def test_a_new_table_has_its_memory() -> None:
    """No insert is the first to write to a part of it, and waits for the system."""
    table = PageTable(Geometry(64, 128), 100_000)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    table.tokens[:] = 1
    table.swa_age[:] = 1
    table.host.locks[:] = 0
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    # 51 MB of tokens are 25 huge pages or 12,500 small ones
    assert faults < 10
