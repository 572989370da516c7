#!/usr/bin/env bash
# SGLang 0.5.23: `/health` answers after one second at the earliest, whatever the server has to do.
#
# The check sends a request of one token and sleeps for a second before it looks whether anything
# came back. So Kubernetes' default of one second for a probe (`timeoutSeconds: 1`) gives up on every
# check of a server that answers its requests in milliseconds, and whoever polls `/health` while a
# server starts, or after each step of a test, waits a second each time. `/ready` answers at once.
#
# Seen on Linux x86-64, Python 3.11. The engine is not started: its check runs beside a manager of
# requests that answers after 5 milliseconds.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/health.py" <<'PYTHON'
import ast
import asyncio
import importlib.util
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

ANSWER_S, PROBE_S = 0.005, 1.0
(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
source = Path(sglang, "srt/entrypoints/http_server.py").read_text()
functions = {
    node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AsyncFunctionDef)
}
checks = [functions[name] for name in ("health_generate", "ready")]
for check in checks:
    check.decorator_list = []


class Manager:
    """Answers every request soon."""

    gracefully_exit, is_generation, server_status = False, True, "Up"
    last_receive_tstamp, rid_to_state, answered = 0.0, {}, 0

    def is_ready(self):
        return True

    async def generate_request(self, obj, request):
        await asyncio.sleep(ANSWER_S)
        self.last_receive_tstamp, self.answered = time.time(), self.answered + 1
        yield {}


def setting(value):
    return SimpleNamespace(get=lambda: value)


manager = Manager()
names = {
    "asyncio": asyncio,
    "time": time,
    "uuid": uuid,
    "Request": object,
    "Response": lambda status_code: status_code,
    "HEALTH_CHECK_RID_PREFIX": "HEALTH_CHECK",
    "HEALTH_CHECK_TIMEOUT": 20,
    "DisaggregationMode": SimpleNamespace(NULL=SimpleNamespace(value="null")),
    "GenerateReqInput": SimpleNamespace,
    "ServerStatus": SimpleNamespace(Starting="Starting", Up="Up", UnHealthy="UnHealthy"),
    "_global_state": SimpleNamespace(tokenizer_manager=manager),
    "envs": SimpleNamespace(
        SGLANG_DIAG_BYPASS_HEALTH_GENERATE=setting(False),
        SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=setting(True),
    ),
    "get_disagg": lambda: SimpleNamespace(disaggregation_mode="null"),
    "logger": None,
}
exec(compile(ast.Module(checks, []), "http_server.py", "exec"), names)
request = SimpleNamespace(url=SimpleNamespace(path="/health"))


async def timed(answer):
    begin = time.monotonic()
    status = await answer
    return status, time.monotonic() - begin


async def main():
    asked = [await timed(names["health_generate"](request)) for _ in range(3)]
    assert manager.answered == 3, manager.answered
    for status, seconds in asked:
        print(f"/health: {status} after {seconds:.3f} s; its request was answered after {ANSWER_S} s")
    status, seconds = await timed(names["ready"]())
    print(f"/ready: {status} after {seconds:.3f} s")
    assert status == 200 and seconds < PROBE_S / 2
    assert all(status == 200 and seconds >= 1.0 for status, seconds in asked), "it answers sooner"
    try:
        await asyncio.wait_for(names["health_generate"](request), PROBE_S - 0.001)
    except asyncio.TimeoutError:
        print(f"a probe that waits for {PROBE_S} s has given up before")
    else:
        raise SystemExit("a probe of a second passes now")


asyncio.run(main())
PYTHON
"$folder/venv/bin/python" "$folder/health.py"
