#!/usr/bin/env bash
# SGLang 0.5.23 and Transformers 5.19.0 read the same `sliding_window: 128` of MiMo-V2-Flash in two
# ways: in SGLang a token of a window layer reads 129 tokens, itself included, in Transformers 128.
#
# SGLang's attention backends take `sliding_window_size` without the token itself. For gpt-oss and
# Mellum the model takes one off the number in the configuration; for MiMo-V2 (its MTP layers too)
# and for Step-3.5 it does not. So the same weights give other logits as soon as a prompt is longer
# than the window, and a cache of windows must keep 128 tokens for MiMo-V2 where 127 do for gpt-oss.
#
# Seen on Linux x86-64, Python 3.11, torch 2.14.1. The engine is not started: the mask is that of
# its torch_native backend, and what a model passes is read from the model's source.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 transformers==5.19.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/compare.py" <<'PYTHON'
import ast
import importlib.util
from pathlib import Path

import torch
from transformers import MiMoV2FlashConfig
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

SGLANG = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt"
LENGTH = 300


def functions(file):
    tree = ast.parse((SGLANG / file).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def engine_mask():
    """The function of the torch_native backend, which needs nothing else of the engine."""
    file = "layers/attention/torch_native_backend.py"
    (found,) = (f for f in functions(file) if f.name == "_make_sliding_window_mask")
    found.decorator_list = []
    names = {"torch": torch}
    exec(compile(ast.Module([found], []), file, "exec"), names)
    return names[found.name]


def passed(file):
    """What a model makes of its configuration: expressions with the window in them."""
    wanted = {"sliding_window_size=config.sliding_window_size", "config.sliding_window - 1",
              "sw - 1", "self.sliding_window = config.sliding_window"}
    text = (SGLANG / file).read_text()
    return sorted(expression for expression in wanted if expression in text)


mask = engine_mask()
window = MiMoV2FlashConfig().sliding_window
theirs = sdpa_mask(
    batch_size=1, q_length=LENGTH, kv_length=LENGTH, allow_is_causal_skip=False,
    mask_function=sliding_window_causal_mask_function(window),
)
print("configuration", window)
print("Transformers reads", int(theirs[0, 0, -1].sum()))
for file in ("gpt_oss", "mellum", "mimo_v2", "mimo_v2_nextn", "step3p5"):
    expressions = passed(f"models/{file}.py")
    less = any(expression.endswith("- 1") for expression in expressions)
    seen = mask(q_len=LENGTH, kv_len=LENGTH, sliding_window_size=window - less, device="cpu")
    print("SGLang,", file, "reads", int(seen[-1].sum()), expressions)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/compare.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
configuration 128
Transformers reads 128
SGLang, gpt_oss reads 128 ['config.sliding_window - 1']
SGLang, mellum reads 128 ['sw - 1']
SGLang, mimo_v2 reads 129 ['sliding_window_size=config.sliding_window_size']
SGLang, mimo_v2_nextn reads 129 ['sliding_window_size=config.sliding_window_size']
SGLang, step3p5 reads 129 ['self.sliding_window = config.sliding_window']
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
