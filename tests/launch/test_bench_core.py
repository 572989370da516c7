"""The bench of tree operations runs another checkout's own bench beside this one's."""

from pathlib import Path

import pytest

from launch.bench.core import BEFORE, Child, checkout

STAND_IN = """
import json
import sglang_ext_cpu
print(json.dumps({"module": __spec__.name, "platform": sglang_ext_cpu.__file__}))
"""


@pytest.mark.parametrize(
    ("bench", "platform"),
    [
        ("launch/bench/core.py", "launch/platform"),
        ("launch/bench/core.py", "cpu_platform"),
        ("launch/bench_core.py", "cpu_platform"),
    ],
)
def test_a_checkout_runs_its_own_bench_on_its_own_platform(
    bench: str, platform: str, tmp_path: Path
) -> None:
    (tmp_path / bench).parent.mkdir(parents=True)
    (tmp_path / bench).write_text(STAND_IN)
    (tmp_path / "launch" / "__init__.py").touch()
    own = tmp_path / platform / "sglang_ext_cpu" / "__init__.py"
    own.parent.mkdir(parents=True)
    own.touch()
    child = Child(BEFORE, (64, 1000, 2048), 0, checkout(str(tmp_path)))
    try:
        found = child.wait()
    finally:
        child.end()
    module = bench.removesuffix(".py").replace("/", ".")
    assert found == {"module": module, "platform": str(own)}
