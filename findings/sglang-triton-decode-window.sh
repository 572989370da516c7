#!/usr/bin/env bash
# SGLang 0.5.23, Triton attention: a token that is decoded reads one token less of its window than
# the same token in a prompt does. With gpt-oss's window of 128 tokens, 127 and 128.
#
# The size of a window comes without the token itself (127). A prompt's token reads as many before
# it, and itself. For a decoded token the backend takes the last 127 of all tokens, and the token
# itself is one of them: `seq_lens` counts it, and its K and V are stored before they are read.
#
# So K and V of an answer behind the window are not those that the same tokens get in the next
# prompt, and what a server says depends on whether its prefix cache had the answer. In float32 with
# a window of 128 the log-probabilities of a tiny model were up to 0.04 apart between a server that
# found answers in its cache and one without a cache, and 3e-6 between two without.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1. The engine is not started: how many tokens are
# taken is computed by its function, and what masks a prompt is read from its kernels.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/window.py" <<'PYTHON'
import ast
import importlib.util
import re
from pathlib import Path

import torch

SGLANG = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
BACKEND = (SGLANG / "srt/layers/attention/triton_backend.py").read_text()
KERNELS = (SGLANG / "kernels/ops/attention/extend_attention.py").read_text()
WINDOW, LENGTH = 128, 300
SIZE = WINDOW - 1  # as models of gpt-oss and Mellum pass it


class Pool:
    """No pool of the engine's: its slots are not looked up."""


class Translator:
    window_kv_kind = None

    def pack_read_stream(self, plan, **kwargs):
        return True


(found,) = (
    node
    for node in ast.parse(BACKEND).body
    if isinstance(node, ast.FunctionDef) and node.name == "update_sliding_window_buffer"
)
names = {"torch": torch, "SWAKVPool": Pool, "BaseSWAKVPool": Pool}
exec(compile(ast.Module([found], []), "triton_backend.py", "exec"), names)
_, _, lengths, starts = names[found.name](
    torch.zeros(2, dtype=torch.int32), Translator(), None, None, SIZE,
    torch.tensor([LENGTH]), 1, "cpu",
)
print("decoded, token", LENGTH - 1, "reads", int(lengths), "from", int(starts))

# q <= k + size, in both kernels for prompts
masks = re.findall(r"q_abs_pos <= \(k_abs_pos \+ SLIDING_WINDOW_SIZE\)", KERNELS)
masks += re.findall(r"<= \(start_n \+ offs_n\[None, :\] \+ SLIDING_WINDOW_SIZE\)", KERNELS)
query, keys = LENGTH - 1, torch.arange(LENGTH)
read = keys[(keys <= query) & (query <= keys + SIZE)]
print("in a prompt, token", query, "reads", len(read), "from", int(read[0]))
print("masks of that form:", len(masks) >= 2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/window.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
decoded, token 299 reads 127 from 173
in a prompt, token 299 reads 128 from 172
masks of that form: True
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
