"""Image, compose file and chart: what a server needs is in them, and their own checkers take
them. No image is built and no cluster asked."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.deploy import checkers
from sglang_ext.adapter import controller
from sglang_ext.adapter.engine_contract import ENGINE_VERSION
from sglang_ext.doctor.memory import RESERVE_BYTES
from sglang_ext.planning import preset
from sglang_ext.planning.launch_line import LaunchLine, parse
from tests.conftest import ROOT
from tests.fixtures.documents import begins, commands
from tests.fixtures.launch_lines import problems
from tests.fixtures.zygote import Zygote
from tests.patches.trees import installed

DEPLOY = ROOT / "launch" / "deploy"
CHART = DEPLOY / "chart"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][
    "server"
]
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SELECTED = "SGLANG_EXT_SWA_HICACHE=1"
"""What the image sets."""
PRESET = "gpt-oss-120b"
"""Whose sizes they have."""
GB = 1000**3
KUBERNETES = ("1.34.0", "1.37.0")
RENDERINGS: dict[str, Sequence[str]] = {
    "as it is": (),
    "with events": ("kvEvents.enabled=true",),
    "with Dynamo's events": ("kvEvents.enabled=true", "kvEvents.format=dynamo"),
    "without storage": ("storage.enabled=false",),
    "with a secret, models and a class": (
        "secret=keys",
        "modelsClaim=hub",
        "storage.className=nvme",
    ),
}


def engine_seconds() -> tuple[int, int, int]:
    """Of a stop: between two looks at requests, for schedulers, for all other processes."""
    source = (installed() / "sglang/srt/managers/tokenizer_manager.py").read_text()
    body = source.partition("async def sigterm_watchdog")[2].partition("\n    def ")[0]
    look = re.search(r"asyncio\.sleep\((\d+)\)", body)
    schedulers = re.search(r"^_SCHEDULER_EXIT_TIMEOUT_SECS = (\d+)$", source, re.MULTILINE)
    rest = re.search(r"kill_process_tree\(.*wait_timeout=(\d+)\)", body)
    assert look is not None
    assert schedulers is not None
    assert rest is not None
    return int(look[1]), int(schedulers[1]), int(rest[1])


def diagnosis_seconds() -> float:
    """That the engine takes at the end of a server whose last health check failed."""
    sources = installed() / "sglang" / "srt"
    pause = re.search(
        r"Sleeping (\d+) seconds before crash diagnostics",
        (sources / "managers" / "tokenizer_manager.py").read_text(),
    )
    dump = re.search(
        r"SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS = EnvFloat\(([\d.]+)\)",
        (sources / "environ.py").read_text(),
    )
    assert pause is not None
    assert dump is not None
    return int(pause[1]) + float(dump[1])


def seconds(text: str) -> int:
    """Of a duration as compose files have it."""
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def ours_to_save() -> float:
    """Seconds that a rank writes to storage at its end."""
    source = Path(controller.__file__).read_text()
    found = re.search(r"^_MOST_SECONDS_TO_SAVE = ([\d.]+)$", source, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_there_is_time_to_save() -> None:
    look, schedulers, rest = engine_seconds()
    assert ours_to_save() < schedulers
    # a look that has just missed the signal, and one that has just missed the last answer
    least = 2 * look + schedulers + rest
    assert VALUES["stop"]["saveSeconds"] >= least
    schema = json.loads((CHART / "values.schema.json").read_text())
    smallest = schema["properties"]["stop"]["properties"]
    assert smallest["saveSeconds"]["minimum"] == least
    # it is one or the other: such a server does not wait for answers
    assert smallest["longestAnswerSeconds"]["minimum"] == diagnosis_seconds()
    answer = VALUES["stop"]["longestAnswerSeconds"]
    assert seconds(COMPOSE["stop_grace_period"]) >= answer + least
    for page in ("operations.md", "deployment.md"):
        assert f"{least} seconds" in (ROOT / "docs" / page).read_text(), page
    said = f"{diagnosis_seconds():.0f} seconds"
    assert said in (ROOT / "docs" / "operations.md").read_text()


def test_all_are_for_the_pinned_engine() -> None:
    recipe = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG ENGINE={ENGINE_VERSION}\n" in recipe
    assert set(re.findall(r"^FROM (\S+)", recipe, re.MULTILINE)) == {"lmsysorg/sglang:v${ENGINE}"}
    assert COMPOSE["image"] == f"sglang-ext:{ENGINE_VERSION}"
    assert VALUES["image"] == {"repository": "sglang-ext", "tag": ENGINE_VERSION}
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == ENGINE_VERSION
    assert f"lmsysorg/sglang:v{ENGINE_VERSION}" in (ROOT / "docs" / "deployment.md").read_text()
    assert f"ENV {SELECTED}\n" in recipe


def spread(arguments: Sequence[str]) -> list[str]:
    """Options and values, a word each."""
    return [word for text in arguments for word in text.split("=", 1)]


def test_the_compose_file_has_the_line_of_the_preset() -> None:
    words = spread(COMPOSE["command"])
    known = preset.load(PRESET).line()
    line = parse(words, "compose")
    assert (line.model, line.tp, line.page_size) == (known.model, known.tp, known.page_size)
    assert line.hicache_size == known.hicache_size
    (gpus,) = COMPOSE["deploy"]["resources"]["reservations"]["devices"]
    assert gpus["count"] == line.ranks
    assert COMPOSE["ulimits"]["memlock"] == -1
    where = json.loads(words[words.index("--hicache-storage-backend-extra-config") + 1])
    assert f"kv:{where['file_storage_path']}" in COMPOSE["volumes"]


def test_the_engine_takes_the_options_of_the_compose_file(zygote: Zygote) -> None:
    assert problems(zygote, [[SELECTED, *spread(COMPOSE["command"])]]) == [[]]


def test_health_is_asked_for_longer_than_the_engine_takes() -> None:
    source = (installed() / "sglang/srt/entrypoints/http_server.py").read_text()
    found = re.search(r'"SGLANG_HEALTH_CHECK_TIMEOUT", (\d+)\)', source)
    assert found is not None
    assert seconds(COMPOSE["healthcheck"]["timeout"]) > int(found[1])
    probes = (CHART / "templates" / "server.yaml").read_text()
    asked = [int(text) for text in re.findall(r"timeoutSeconds: (\d+)", probes)]
    assert len(asked) == 3
    assert min(asked) > int(found[1])


# ---- their own checkers ------------------------------------------------------


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a checker, which must have no objection: what it prints."""
    folder = tmp_path_factory.mktemp("checkers")
    checkers.fetch(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "HOME": str(folder)}

    def run(program: str, *arguments: str) -> str:
        command = [str(folder / "bin" / program), *arguments]
        told = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    return run


@pytest.mark.full
def test_hadolint_has_nothing_to_say(check: Callable[..., str]) -> None:
    assert check("hadolint", str(DEPLOY / "Dockerfile")) == ""


def resolved(check: Callable[..., str]) -> dict[str, Any]:
    """The service as Docker Compose reads it."""
    text = check("docker-compose", "-f", str(DEPLOY / "compose.yaml"), "config")
    service: dict[str, Any] = yaml.safe_load(text)["services"]["server"]
    return service


@pytest.mark.full
def test_compose_reads_the_file(check: Callable[..., str]) -> None:
    service = resolved(check)
    assert service["command"] == COMPOSE["command"]
    context = Path(service["build"]["context"])
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).exists()


@pytest.mark.full
@pytest.mark.parametrize("settings", RENDERINGS.values(), ids=RENDERINGS)
def test_kubernetes_and_the_engine_take_what_the_chart_renders(
    check: Callable[..., str], zygote: Zygote, tmp_path: Path, settings: Sequence[str]
) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    check("helm", "lint", "--strict", str(CHART), *options)
    text = check("helm", "template", "cache", str(CHART), *options)
    manifest = tmp_path / "rendered.yaml"
    manifest.write_text(text)
    for version in KUBERNETES:
        check("kubernetes-validate", "--strict", "-k", version, str(manifest))
    (server,) = (part for part in yaml.safe_load_all(text) if part["kind"] == "StatefulSet")
    pod = server["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = list(container["args"])
    assert problems(zygote, [[SELECTED, *words]]) == [[]]
    assert_resources(parse(words, "chart"), pod, container)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= VALUES["startup"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] == sum(VALUES["stop"].values())


def assert_resources(line: LaunchLine, pod: dict[str, Any], container: dict[str, Any]) -> None:
    """A pod has the memory that its launch line asks for, and may pin it."""
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    assert limits["nvidia.com/gpu"] == line.ranks
    shared = next(v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm")
    least = line.ranks * line.hicache_size * GB + RESERVE_BYTES + int(shared.removesuffix("G")) * GB
    assert int(limits["memory"].removesuffix("G")) * GB >= least
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("hicacheSize=3", "hicacheSize"),
        ("stop.saveSeconds=20", "saveSeconds"),
        ("kvEvents.format=other", "format"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(
    check: Callable[..., str], setting: str, named: str
) -> None:
    with pytest.raises(AssertionError, match=named):
        check("helm", "template", "cache", str(CHART), "--set", setting)


PARSED = {"docker": "docker-compose", "helm": "helm"}
"""Programs of the documents, and what takes them apart."""


@pytest.mark.full
@pytest.mark.parametrize("words", [w for w in commands() if begins(w) in PARSED], ids=" ".join)
def test_a_documented_command_is_taken(check: Callable[..., str], words: Sequence[str]) -> None:
    """As far as it goes without a daemon and a cluster."""
    program, rest = PARSED[words[0]], list(words[1:])
    if program == "helm":
        # an installation renders first
        check("helm", *("template" if word == "install" else word for word in rest))
        return
    assert rest[:3] == ["compose", "-f", "launch/deploy/compose.yaml"]
    command = next(word for word in rest[3:] if not word.startswith("-"))
    told = check("docker-compose", command, "--help")
    options = rest[rest.index(command) + 1 :]
    if command == "exec":  # what follows the service is a command of its own
        service, tool, *_ = options
        assert (service, tool) == ("server", "sglang-ext")
        options = []
    for word in options:
        assert not word.startswith("-") or re.search(rf"(?<![\w-]){word}(?![\w-])", told), word
        assert word.startswith("-") or word == "server"
