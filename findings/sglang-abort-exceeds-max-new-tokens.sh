#!/usr/bin/env bash
# SGLang 0.5.23, speculative decoding: an answer that is aborted may have more tokens than
# `max_new_tokens`, by as many as drafts stand in one step.
#
# A step may accept several drafts, so it can go beyond the length that was asked for. All other ends
# (length, EOS, stop strings) cut the answer at that length. An abort that is seen in the same step
# returns before that, and what the client gets is not cut.
#
# Who compares an aborted answer with a prefix of the whole one, or counts tokens to bill, meets
# answers longer than they can be. Without drafts a step has one token and this cannot happen.
#
# Seen on Linux x86-64, Python 3.11. The engine is not started: its method runs on a request that has
# 14 of 16 tokens and gets four in a step.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/abort.py" <<'PYTHON'
import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

NAMES = ("update_finish_state", "_cap_finished_len_at_max_new_tokens", "output_ids_through_stop")
(sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
tree = ast.parse(Path(sglang, "srt/managers/schedule_batch.py").read_text())
(request,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Req")
methods = [n for n in request.body if isinstance(n, ast.FunctionDef) and n.name in NAMES]
for method in methods:
    method.decorator_list = []
    method.returns = None
names = {"FINISH_LENGTH": lambda length: f"length {length}"}
exec(compile(ast.Module(methods, []), "schedule_batch.py", "exec"), names)


class Request:
    """What the methods look at; no end but the length is near."""

    def __init__(self, to_finish):
        self.output_ids = list(range(14 + 4))
        self.sampling_params = SimpleNamespace(max_new_tokens=16)
        self.to_finish, self.finished_reason, self.finished_len = to_finish, None, None

    def finished(self):
        return self.finished_reason is not None

    def never(self, *_):
        return False

    _check_vocab_boundary_finish = _check_str_based_finish = _check_token_based_finish = never


for name in NAMES:
    setattr(Request, name, names[name])
for end in (None, "abort"):
    made = Request(end)
    made.update_finish_state(4)
    print(f"ended by {made.finished_reason}: {len(made.output_ids_through_stop())} tokens of 16")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/abort.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
ended by length 16: 16 tokens of 16
ended by abort: 18 tokens of 16
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
