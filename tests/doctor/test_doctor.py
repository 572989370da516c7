"""Every fault is named with its cause and what to do, and is the exit status."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_ext.doctor import cli
from sglang_ext.doctor.finding import Verdict
from sglang_ext.doctor.machine import Machine
from sglang_ext.patches.patch_set import plan, series, write
from tests.fixtures.zygote import Zygote
from tests.patches.trees import copy_touched
from tests.planning.models import saved

THREADS = "SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS"
GOOD = Machine(
    available=600 * 10**9,
    cgroup_left=None,
    memlock=None,
    free_hugepages={"2MB": 0, "1GB": 0},
    numa_nodes=2,
    cpus=64,
    environment={"SGLANG_EXT_SWA_HICACHE": "1", THREADS: "16"},
)


@dataclasses.dataclass(frozen=True)
class FakeEngine:
    """An engine with nothing wrong, unless a test says so."""

    version: str | None = None
    loaded: Mapping[str, str | None] = dataclasses.field(
        default_factory=lambda: {"swa_hicache": None}
    )
    hooks: str | None = None
    signatures: str | None = None
    shown: Collection[str] = ()
    line: Sequence[str] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def version_problem(self) -> str | None:
        return self.version

    def plugins(self) -> Mapping[str, str | None]:
        return self.loaded

    def hooks_problem(self) -> str | None:
        return self.hooks

    def signatures_problem(self) -> str | None:
        return self.signatures

    def shown_patches(self) -> Collection[str]:
        return self.shown

    def device(self) -> str:
        return "cuda"

    def line_problems(self, words: Sequence[str], *, selected: bool) -> Sequence[str]:
        return self.line

    def storage_settings(self, text: str | None) -> Mapping[str, Any]:
        return self.settings


class Doctor:
    """Runs the command; what it says by check, and its exit status."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capsys = capsys
        self.model = saved(folder / "model")

    def __call__(
        self,
        line: str | None = "--hicache-size 100 --tp 2",
        machine: Machine = GOOD,
        engine: FakeEngine | None = None,
        root: Path | None = None,
    ) -> dict[str, tuple[str, str]]:
        words = [] if root is None else ["--root", str(root)]
        if line is not None:
            words += ["--", "--model-path", str(self.model), *line.split()]
        self.status = cli.main(words, machine, engine or FakeEngine())
        said = self._capsys.readouterr().out.splitlines()
        assert all(len(found.split("  ")) > 1 for found in said)
        return {found[7:26].strip(): (found[:5].strip(), found[28:]) for found in said}

    def fault(self, check: str, **given: Any) -> str:
        """What is said of the one fault."""
        found = self(**given)
        assert self.status == 1
        assert [name for name, (verdict, _) in found.items() if verdict == "FAULT"] == [check]
        return found[check][1]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Doctor:
    return Doctor(capsys, tmp_path)


def with_environment(**variables: str) -> Machine:
    return dataclasses.replace(GOOD, environment={"SGLANG_EXT_SWA_HICACHE": "1", **variables})


def test_nothing_is_wrong(doctor: Doctor) -> None:
    found = doctor()
    assert doctor.status == 0, found
    assert {verdict for verdict, _ in found.values()} == {"ok", "note"}
    for check in (
        "versions", "variables", "engine", "entry points", "hooks", "signatures", "patches",
        "launch line", "model", "host memory", "ulimit -l", "hugepages", "parallel allocation",
        "NUMA", "storage",
    ):  # fmt: skip
        assert check in found
    assert "torch" in found["versions"][1]
    assert "2 nodes" in found["NUMA"][1]
    assert "tokens of full attention" in found["model"][1]


def test_without_a_launch_line_the_budget_is_not_known(doctor: Doctor) -> None:
    found = doctor(line=None)
    assert doctor.status == 0
    assert "launch line" not in found
    assert found["host memory"][0] == "note"


def test_a_wrong_version_of_the_engine(doctor: Doctor) -> None:
    engine = FakeEngine(version="this release works with sglang 0.5.23, but 0.5.22 is installed")
    said = doctor.fault("engine", engine=engine)
    assert "0.5.22" in said
    assert "install" in said


def test_a_plugin_that_is_kept_out(doctor: Doctor) -> None:
    said = doctor.fault("entry points", machine=with_environment(SGLANG_PLUGINS="other, more"))
    assert "SGLANG_PLUGINS=other, more keeps swa_hicache from loading" in said
    assert "add swa_hicache" in said
    assert doctor(machine=with_environment(SGLANG_PLUGINS="other,swa_hicache"))
    assert doctor.status == 0


def test_a_plugin_that_is_not_there_or_does_not_load(doctor: Doctor) -> None:
    assert "not installed" in doctor.fault("entry points", engine=FakeEngine(loaded={}))
    broken = FakeEngine(loaded={"swa_hicache": "ImportError('numba')"})
    assert "ImportError('numba')" in doctor.fault("entry points", engine=broken)
    other = FakeEngine(loaded={"swa_hicache": None, "other": "ImportError()"})
    assert doctor(engine=other)["entry points"] == ("note", "swa_hicache loads; other does not")


def test_a_hook_that_is_not_applied(doctor: Doctor) -> None:
    said = doctor.fault("hooks", engine=FakeEngine(hooks="the hook on x.y did not take effect"))
    assert "the hook on x.y did not take effect" in said


def test_signatures_that_differ(doctor: Doctor) -> None:
    said = doctor.fault("signatures", engine=FakeEngine(signatures="x.y takes (a), expected (b)"))
    assert "x.y takes (a), expected (b)" in said


def test_a_variable_that_is_not_known(doctor: Doctor) -> None:
    said = doctor.fault("variables", machine=with_environment(SGLANG_EXT_SWA="1"))
    assert "SGLANG_EXT_SWA" in said


def test_a_budget_larger_than_the_memory(doctor: Doctor) -> None:
    small = dataclasses.replace(GOOD, available=150 * 10**9)
    said = doctor.fault("host memory", machine=small)
    assert "a rank on 2" in said
    assert "but the memory has 139.26 GB for it (150.00 GB available" in said
    assert "of at most 69.6 GB a rank" in said


def test_a_budget_larger_than_the_cgroup(doctor: Doctor) -> None:
    contained = dataclasses.replace(GOOD, cgroup_left=100 * 10**9)
    said = doctor.fault("host memory", machine=contained)
    assert "but the cgroup has 89.26 GB for it" in said
    assert "raise the container's memory limit" in said


def test_a_ratio_is_a_budget_too(doctor: Doctor) -> None:
    ratio = "--hicache-ratio 500 --max-total-tokens 200000 --page-size 64 --tp 2"
    assert "--hicache-ratio" in doctor.fault("host memory", line=ratio)
    nodes = "--hicache-size 100 --tp 2 --nnodes 2"
    half = dataclasses.replace(GOOD, available=120 * 10**9)
    assert "on 1" in doctor(line=nodes, machine=half)["host memory"][1]
    assert doctor.status == 0


def test_a_cache_on_the_device_alone_needs_no_memory(doctor: Doctor) -> None:
    machine = dataclasses.replace(GOOD, available=0, environment={})
    assert doctor(machine=machine)["model"] == (
        "note", "no host tier; --enable-hierarchical-cache adds it",
    )  # fmt: skip
    assert doctor.status == 0
    tier = "--hicache-size 100 --tp 2 --enable-hierarchical-cache"
    doctor.fault("host memory", line=tier, machine=machine)


def test_low_memlock(doctor: Doctor) -> None:
    low = dataclasses.replace(GOOD, memlock=8 * 1024**2)
    said = doctor.fault("ulimit -l", machine=low)
    assert "8.39 MB may be locked" in said
    assert "ulimit -l unlimited" in said
    assert doctor(line=None, machine=low)["ulimit -l"][0] == "note"


def test_hugepages(doctor: Doctor) -> None:
    few = dataclasses.replace(
        with_environment(SGLANG_HUGEPAGE_SIZE="1GB"), free_hugepages={"2MB": 0, "1GB": 10}
    )
    said = doctor.fault("hugepages", machine=few)
    assert "10.74 GB of 1GB are free" in said
    assert "reserve 187 of them" in said
    enough = dataclasses.replace(few, free_hugepages={"2MB": 0, "1GB": 187})
    assert doctor(machine=enough)["hugepages"][0] == "ok"
    assert "is not a size" in doctor.fault(
        "hugepages", machine=with_environment(SGLANG_HUGEPAGE_SIZE="4MB")
    )


def test_allocation_with_one_thread(doctor: Doctor) -> None:
    verdict, said = doctor(machine=with_environment())["parallel allocation"]
    assert verdict == "note"
    assert f"set {THREADS}=16" in said
    assert "no number" in doctor.fault(
        "parallel allocation",
        machine=with_environment(**{THREADS: "many"}),
    )


def test_an_option_that_is_not_supported(doctor: Doctor) -> None:
    problem = "--pp-size 2 is not supported by --radix-cache-backend swa_hicache; allowed: 1"
    assert problem in doctor.fault("launch line", engine=FakeEngine(line=[problem]))


FILE = "--hicache-size 100 --hicache-storage-backend file"


def test_a_storage_directory_that_cannot_be_written(doctor: Doctor, tmp_path: Path) -> None:
    place = tmp_path / "a file" / "pages"
    place.parent.write_text("")
    settings = FakeEngine(settings={"file_storage_path": str(place)})
    said = doctor.fault("storage", line=FILE, engine=settings)
    assert f"{place} cannot be written to" in said
    assert "file_storage_path" in said
    by_variable = with_environment(SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR="/proc/pages")
    said = doctor.fault("storage", line=FILE, machine=by_variable)
    assert "(SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR)" in said


def test_a_storage_directory_that_will_be_made(doctor: Doctor, tmp_path: Path) -> None:
    settings = FakeEngine(settings={"file_storage_path": str(tmp_path / "new" / "pages")})
    verdict, said = doctor(line=FILE, engine=settings)["storage"]
    assert verdict == "ok"
    assert "will be made" in said
    assert not (tmp_path / "new").exists(), "nothing is changed"


def test_patches_that_are_there(doctor: Doctor, tmp_path: Path) -> None:
    root = copy_touched(tmp_path / "engine")
    write(plan(series()[:1], root))
    assert doctor(root=root)["patches"] == ("ok", f"applied: {series()[0].name}")
    assert doctor.status == 0


def test_a_stale_patch(doctor: Doctor, tmp_path: Path) -> None:
    """What an older release has applied, or somebody has changed since."""
    root, patch = copy_touched(tmp_path / "engine"), series()[2]
    write(plan([patch], root))
    file = root / patch.files[0].path
    file.write_text(file.read_text() + "# as it was\n")
    found = list(cli.findings(GOOD, FakeEngine(shown=[patch.name]), None, root))
    (stale,) = [one for one in found if one.verdict is Verdict.FAULT]
    assert stale.check == "patches"
    assert stale.found.startswith(f"{patch.name} is stale: {file} differs from sglang")
    assert "revert it" in stale.advice
    # an engine that shows no patch is somebody's fork: the hook is there
    doctor(root=root)
    assert doctor.status == 0


def test_a_model_is_needed_and_may_be_unknown(doctor: Doctor, tmp_path: Path) -> None:
    assert cli.main(["--", "--hicache-size", "1"], GOOD, FakeEngine()) == 1
    (doctor.model / "config.json").unlink()
    verdict, said = doctor()["model"]
    assert verdict == "note"
    assert "has no config.json" in said
    assert doctor.status == 0


def test_the_installed_engine(zygote: Zygote, tmp_path: Path) -> None:
    """The engine's own parser, plugins and functions, as a server would use them."""
    model = str(saved(tmp_path / "model"))
    line = ["--model-path", model, "--hicache-size", "1", "--hicache-storage-backend", "file"]
    line += ["--hicache-storage-backend-extra-config", '{"file_storage_path": "/proc/pages"}']
    wrong = ["--dcp-size", "2", "--attn-cp-size", "2", "--enable-lmcache"]
    run = zygote.run("-m", "sglang_ext", "doctor", "--", *line, *wrong, SGLANG_EXT_SWA_HICACHE="1")
    assert run.returncode == 1, run.stderr
    for said in (
        "ok     engine               sglang 0.5.23",
        "ok     hooks                all in effect",
        "ok     signatures           ",
        "ok     patches              applied: ",
        "FAULT  launch line          --dcp-size 2 is not supported",
        "FAULT  launch line          --attn-cp-size 2 is not supported",
        "FAULT  launch line          --enable-lmcache True is not supported",
        "FAULT  storage              /proc/pages cannot be written to",
        "without CUDA nothing is",
    ):
        assert said in run.stdout, run.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--tp", "many"], "--tp 'many' is not allowed"),
        (["--radix-cache-backend", "other"], "it does not select this cache"),
        ([], "it does not select this cache"),
        (["--radix-cache-backend", "swa_hicache"], "every option is supported"),
        (["SGLANG_EXT_SWA_HICACHE=1"], "every option is supported"),
    ],
)
def test_a_launch_line_is_read_by_the_engine(
    zygote: Zygote, words: list[str], named: str, tmp_path: Path
) -> None:
    model = ["--model-path", str(saved(tmp_path / "model"))]
    line = [*words, *model] if words and "=" in words[0] else [*model, *words]
    run = zygote.run("-m", "sglang_ext", "doctor", "--", *line)
    assert named in run.stdout + run.stderr
    assert run.returncode == (0 if "every" in named else 2 if "many" in named else 1)


def test_the_installed_engine_without_the_plugin(zygote: Zygote) -> None:
    run = zygote.run("-m", "sglang_ext", "doctor", SGLANG_PLUGINS="__none__")
    assert run.returncode == 1
    assert "SGLANG_PLUGINS=__none__ keeps swa_hicache from loading" in run.stdout
