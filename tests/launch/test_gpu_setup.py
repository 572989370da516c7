"""What ``gpu_setup.sh`` brings, and what its list says is there, is all that the bench needs."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import bare_machine
from tests.launch.bare_machine import ROOT

SCRIPT = ROOT / "launch" / "bench" / "gpu" / "gpu_setup.sh"
MODULES = (
    "launch.bench.gpu.__main__",
    "launch.bench.gpu.part",
    "sglang_ext.tools.gpu_check",
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.layers.attention.triton_backend",
    # on a GPU alone: the engine's copies, its graphs, its compiler
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
    "sglang.kernels.jit.utils",
    "tvm_ffi.cpp",
    "sglang_ext_cpu.gpu_copies",
    # what a server with our cache imports when it is up
    "sglang_ext.adapter.factory",
    "sglang_ext.kernels.page_copy.gpu",
    "sglang_ext.transfer.cuda",
    # servers of the part on load have metrics
    "prometheus_client.multiprocess",
)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the bare machine's interpreter."""
    interpreter, variables = bare_machine.make(tmp_path_factory.mktemp("machine"))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [str(interpreter), "-W", "ignore", *options]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**kept, **variables},
            cwd=ROOT,
            check=False,
        )

    return run


def test_nothing_else_that_is_installed_here_can_be_imported(bare: Run) -> None:
    """Or the next tests would show nothing."""
    found = bare(
        "-c", "import importlib.util as u; print(u.find_spec('pytest'), *__import__('sys').path)"
    )
    said = found.stdout.split()
    assert said[0] == "None", found.stderr
    assert not [path for path in said[1:] if "site-packages" in path and ".venv" in path]


@pytest.mark.full
def test_every_module_that_the_bench_needs_is_brought_or_there(bare: Run) -> None:
    code = "\n".join(
        [
            "import os",
            "os.environ['SGLANG_PLATFORM'] = 'ext_cpu'",
            *(f"import {m}" for m in MODULES),
        ]
    )
    found = bare("-c", code)
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_plugins_are_found_by_their_entry_points(bare: Run) -> None:
    code = (
        "from importlib.metadata import entry_points as e\n"
        "print(sorted(p.value for g in e().groups if g.startswith('sglang') for p in e(group=g)))"
    )
    found = bare("-c", code)
    assert "sglang_ext.plugin" in found.stdout and "sglang_ext_cpu" in found.stdout, found


def test_without_a_verb_it_says_how_it_is_called() -> None:
    run = subprocess.run(["sh", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "usage: gpu_setup.sh collect FILE" in run.stdout


def test_what_is_installed_is_where_the_printed_variables_say(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "sgl_kernel_copies").mkdir(parents=True)
    (site / "brought.py").write_text("HERE = 1\n")
    subprocess.run(
        ["tar", "-C", str(tmp_path), "-cJf", str(tmp_path / "x.tar.xz"), "site"], check=True
    )
    shown = "import os, brought, launch, sglang_ext_cpu"
    shown += "; print(os.path.isdir(os.environ['EXT_CPU_SGL_KERNEL']))"
    code = f'eval "$(sh "$0" install "$1" "$2")" && python3 -c "{shown}"'
    command = ["sh", "-c", code, str(SCRIPT), str(tmp_path / "x.tar.xz"), str(tmp_path / "there")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout == "True\n", run.stderr
