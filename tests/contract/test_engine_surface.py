"""The installed engine is the one the adapter was written against."""

import ast
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from sglang_ext.adapter import engine_contract, setup
from sglang_ext.errors import StartupError
from tests.fixtures.zygote import Zygote


def test_pinned_signatures_match_the_engine(zygote: Zygote) -> None:
    run = zygote.run(
        "-c", "from sglang_ext.adapter import engine_contract as c; print(c.problem())"
    )
    assert run.stdout.strip().endswith("None"), run.stdout + run.stderr[-2000:]


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "sglang.srt.mem_cache.registry.register_radix_cache_backend"
    monkeypatch.setattr(engine_contract, "SIGNATURES", {path: "name factory extra"})
    problem = engine_contract.problem()
    assert problem is not None
    assert f"{path} takes (name factory), expected (name factory extra)" in problem


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_contract, "SIGNATURES", {"sglang.srt.mem_cache.registry.gone": ""})
    problem = engine_contract.problem()
    assert problem is not None
    assert "registry.gone is missing" in problem


def test_another_version_stops_a_server_that_asks_for_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_contract, "ENGINE_VERSION", "9.9.9")
    monkeypatch.setattr(sys, "argv", ["launch", "--radix-cache-backend", "swa_hicache"])
    with pytest.raises(StartupError, match=r"works with sglang 9\.9\.9, but sglang 0\.5\.23 is"):
        setup.install()


def test_the_real_launcher_refuses_another_version_before_it_looks_at_the_model(
    zygote: Zygote,
) -> None:
    run = zygote.run(
        "-c",
        "import runpy, sglang, sys; sglang.__version__ = '0.5.22'; "
        "sys.argv = 'x --model-path /nowhere --radix-cache-backend swa_hicache'.split(); "
        "runpy.run_module('sglang.launch_server', run_name='__main__')",
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith(
        "sglang-ext: this release works with sglang 0.5.23, but sglang 0.5.22 is installed"
    )


def test_a_hook_that_did_not_take_is_noticed(zygote: Zygote) -> None:
    run = zygote.run("-c", "from sglang_ext.adapter import setup; setup.verify_hooks()")
    assert run.returncode == 1
    assert "resolve_once did not take effect" in run.stderr


def test_entry_points_are_installed_and_apart() -> None:
    points = importlib.metadata.entry_points()
    general = {p.name: p for p in points.select(group="sglang.srt.plugins")}
    platforms = {p.name: p for p in points.select(group="sglang.srt.platforms")}
    assert general["swa_hicache"].value == "sglang_ext.plugin:register"
    assert platforms["ext_cpu"].dist.name == "sglang-ext-cpu"
    # SGLang skips general plugins of distributions that ship another platform
    assert general["swa_hicache"].dist.name == "sglang-ext"


def tree_cache_attributes() -> set[str]:
    """Names that the engine reads from ``tree_cache`` outside the caches themselves."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0]) / "srt"
    files = [*(root / "managers").rglob("*.py"), root / "mem_cache" / "common.py"]
    files += [root / "mem_cache" / "allocation.py", root / "mem_cache" / "prefill_budget.py"]
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and _is_tree_cache(node.value):
                names.add(node.attr)
    return names


def _is_tree_cache(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "tree_cache"
    return isinstance(node, ast.Name) and node.id == "tree_cache"


REFUSED_OR_GUARDED = {
    # only with options that are refused: sessions, mamba, PD, pipelines, linker
    "all_mamba_values_flatten", "backup_kv_cache", "bind_prefetch_ticket", "components",
    "dec_host_lock_ref", "discard_kv_cache_backup", "ensure_session_generation",
    "finish_external_linker_loads", "has_pending_cache_operations", "host_pool_group",
    "inc_host_lock_ref", "linker", "mamba_evictable_size", "mamba_protected_size",
    "open_radix_session", "release_swa_prefix_lock", "restore_kv_cache", "sidecar_pool_specs",
    "tree_core", "unified_cache", "prefetch_outcome_stats_snapshot", "all_values_flatten",
}  # fmt: skip


def test_every_attribute_the_engine_reads_is_answered(zygote: Zygote) -> None:
    run = zygote.run(
        "-c",
        "from sglang_ext.adapter.prefix_cache import SwaHiCache as C; print(*dir(C))",
    )
    answered = set(run.stdout.split())
    answered |= {  # set in __init__
        "disable", "req_to_token_pool", "token_to_kv_pool_allocator", "page_size",
        "sliding_window_size", "cache_controller", "full_kv_pool_host",
        "metrics",
    }  # fmt: skip
    missing = tree_cache_attributes() - answered - REFUSED_OR_GUARDED
    assert not missing, f"the engine reads {sorted(missing)} from a tree cache"
