"""Shapes that we read of a ``config.json`` are those that the engine sizes its pools with."""

import json
from pathlib import Path

import pytest

from launch.models.architectures import MAKERS, ready_made
from launch.models.tiny import ready_made as mellum
from sglang_ext.planning.model_config import find, load, shape_of
from tests.fixtures.zygote import Zygote

RANKS = (1, 2, 8)
ENGINE = """
import json, sys
from sglang.srt.configs.model_config import ModelConfig
model = ModelConfig(sys.argv[1], dtype="float32")
sizes = {}
for ranks in json.loads(sys.argv[2]):
    full, swa = model.get_num_kv_heads(ranks), model.get_swa_num_kv_heads(ranks)
    sizes[ranks] = [
        [len(model.full_attention_layer_ids) * full * width * 4
         for width in (model.head_dim, model.v_head_dim)],
        [len(model.swa_attention_layer_ids) * swa * width * 4
         for width in (model.swa_head_dim, model.swa_v_head_dim)],
    ]
print(json.dumps(sizes))
"""


@pytest.mark.parametrize("name", [*MAKERS, "mellum"])
def test_bytes_of_a_token_on_a_rank(zygote: Zygote, name: str) -> None:
    model: Path = mellum(128) if name == "mellum" else ready_made(name)
    run = zygote.run("-c", ENGINE, str(model), json.dumps(RANKS))
    assert run.returncode == 0, run.stderr
    whole = shape_of(load(find(str(model))), dtype="float32")
    for ranks, sizes in json.loads(run.stdout.splitlines()[-1]).items():
        rank = whole.on(int(ranks))
        assert [list(rank.full_widths), list(rank.swa_widths)] == sizes, ranks
