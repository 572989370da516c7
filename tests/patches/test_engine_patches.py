"""Where the engine has a patch, there is no hook."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_ext.adapter import engine_patches, setup
from sglang_ext.patches import cli
from sglang_ext.patches.patch_set import series
from tests.conftest import ROOT, engine_child
from tests.patches.trees import copy_engine, python_path

READERS = {
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    f"._run_sdpa_forward_{kind}"
    for kind in ("extend", "decode")
}


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *patches: str) -> dict[str, Any]:
    """What the extension does in an engine with some patches."""
    root = copy_engine(tmp_path / "engine")
    assert cli.main(["apply", *patches, "--root", str(root)]) == 0
    monkeypatch.setenv("PYTHONPATH", python_path(root))
    answer: dict[str, Any] = json.loads(engine_child("tests.patches.seen")[-1])
    assert [name[:4] for name in answer["applied"]] == list(patches)
    return answer


@pytest.mark.full
def test_attention_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other two are hooked as in an engine without patches."""
    answer = seen(tmp_path, monkeypatch, "0001", "0004")
    hooks = set(answer["hooks"])
    assert not hooks & {*READERS, setup.RESOLVE}
    assert answer["steps"] == 1
    assert setup.MODEL_OVERRIDES in hooks
    assert answer["host pools"]["replaced"]


@pytest.mark.full
def test_window_memory_and_host_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other two are hooked as in an engine without patches."""
    answer = seen(tmp_path, monkeypatch, "0002", "0003")
    hooks = set(answer["hooks"])
    assert hooks >= {*READERS, setup.RESOLVE}
    assert answer["steps"] is None
    assert setup.MODEL_OVERRIDES not in hooks
    assert answer["keeps memory"]
    assert answer["host pools"] == {
        "replaced": False,
        "allocators": ["_Allocator"],
        "one each": True,
        "after": "HostTensorAllocator",
        "registered again": 0,
        "registered others": 1,
    }


def test_every_patch_is_looked_for_by_what_it_adds() -> None:
    added = {
        patch.name: b"\n".join(
            line for hunk in patch.files[0].hunks for line in hunk.new if line not in hunk.old
        )
        for patch in series()
    }
    known = {patch.name: patch.attribute for patch in engine_patches.KNOWN}
    assert known.keys() == added.keys()
    assert all(attribute.encode() in added[name] for name, attribute in known.items())
    # the CPU platform is a distribution of its own
    attention = (ROOT / "launch/platform/sglang_ext_cpu/attention.py").read_text()
    assert f'"{engine_patches.ATTENTION.attribute}"' in attention
