#!/usr/bin/env bash
# SGLang 0.5.23 with several DP ranks: the process that hands requests to them keeps a core busy for
# as long as the server lives, with requests or without, and `--sleep-on-idle` does not reach it.
#
# Its loop asks a socket for a request without waiting, and asks again at once. Schedulers do the same
# unless `--sleep-on-idle` is set, which the option's help says of the whole server. On a machine with
# few cores it takes what the ranks need: tests of two DP ranks on two cores spent 105 of 159 seconds
# of CPU time there.
#
# Seen on Linux x86-64, Python 3.11. The engine is not started: its loop runs on a socket to which
# nobody sends, and CPU time is that of its thread.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyzmq==27.3.0
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/idle.py" <<'PYTHON'
import ast
import importlib.util
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import zmq

SECONDS = 2.0
(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
source = Path(sglang, "srt/managers/data_parallel_controller.py").read_text()
(loop,) = (
    node
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.FunctionDef) and node.name == "event_loop"
)
names = {"zmq": zmq, "sock_recv": lambda socket, flags=0: socket.recv(flags=flags)}
exec(compile(ast.Module([loop], []), "data_parallel_controller.py", "exec"), names)

asked = 0


class Socket:
    def __init__(self):
        self.socket = zmq.Context().socket(zmq.PULL)
        self.socket.bind("inproc://requests")

    def recv(self, flags):
        global asked
        asked += 1
        return self.socket.recv(flags)


spent = 0.0


def measure():
    global spent
    watchdog = SimpleNamespace(feed=note)
    controller = SimpleNamespace(
        soft_watchdog=watchdog, recv_from_tokenizer=Socket(), _request_dispatcher=print
    )
    names["event_loop"](controller)


def note():
    global spent
    spent = time.thread_time()


threading.Thread(target=measure, daemon=True).start()
time.sleep(SECONDS)
print("of its time the loop was running more than a third:", spent > SECONDS / 3)
print("asked more than 10,000 times:", asked > 10_000)
fields = Path(sglang, "srt/arg_groups/fields/device.py").read_text()
print("help:", re.search(r'sleep_on_idle: A\[bool, "([^"]*)"', fields)[1])
print("it looks at that option:", "sleep_on_idle" in source)
sys.stdout.flush()
os._exit(0)  # the loop never ends
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/idle.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
of its time the loop was running more than a third: True
asked more than 10,000 times: True
help: Reduce CPU usage when sglang is idle.
it looks at that option: False
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
