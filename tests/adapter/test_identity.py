"""Whose KV it is: what changes what is computed changes the identity, and nothing else does."""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt import runtime_context
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.server_args import ServerArgs

from sglang_ext.adapter import checkpoint, drafts, host_pools, storage_setup
from sglang_ext.adapter.identity import KV_OPTIONS, Kind
from sglang_ext.adapter.served_weights import ServedWeights, Source, is_elsewhere
from sglang_ext.core.table.geometry import Geometry

SHAPES = {f"model.layers.{n}.self_attn.{p}_proj.weight": (64, 64) for n in range(4) for p in "qkvo"}
LARGE = "model.embed_tokens.weight"
"""6 MiB: it is sampled."""


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a small model."""
    rng = np.random.default_rng(seed)
    shapes = {**SHAPES, LARGE: (1024, 1536)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_tensors(path: Path, values: dict[str, np.ndarray]) -> None:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, value in values.items():
        header[name] = {
            "dtype": "F32",
            "shape": value.shape,
            "data_offsets": (first, first + value.nbytes),
        }
        first += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in values.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_model(root: Path, seed: int = 0) -> Path:
    """A checkpoint."""
    root.mkdir(parents=True)
    config = {"architectures": ["MellumForCausalLM"], "rope_theta": 10000.0}
    (root / "config.json").write_text(json.dumps(config))
    (root / "tokenizer.json").write_text("{}")
    write_tensors(root / "model.safetensors", tensors(seed))
    return root


def same(values: Sequence[int]) -> list[int]:
    """Agreement of a single rank."""
    return list(values)


class Server:
    """What a server knows of itself, and the identity that follows from it."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path | None) -> None:
        self._patch = patch
        self.root = root
        self.options: dict[str, Any] = {option.name: None for option in KV_OPTIONS}
        self.dtypes = ["torch.bfloat16", "torch.bfloat16"]
        self.page_bytes = [4096, 2048]
        self.layers = [{1: 0, 3: 1}, {0: 0, 2: 1}]
        self.geometry = Geometry(device_page=16, window=128)
        self.layout = "page_first"
        self.tp_size = self.attn_tp_size = 1
        self.stacks: list[Any] = []
        self.drafts: list[Path | None] = []
        draft_options = ("speculative_algorithm", *drafts.OPTIONS)
        self.options |= dict.fromkeys(draft_options)

    def setup(self) -> storage_setup.StorageSetup:
        components = [
            SimpleNamespace(dtype=dtype, bytes=size)
            for dtype, size in zip(self.dtypes, self.page_bytes, strict=True)
        ]
        pool: Any = SimpleNamespace(full_kv_pool=components[0], swa_kv_pool=components[1])
        entry = SimpleNamespace(host_pool=SimpleNamespace(layout=self.layout))
        context = SimpleNamespace(config_leaf=self.options.__getitem__)
        parallel = SimpleNamespace(tp_size=self.tp_size, attn_tp_size=self.attn_tp_size)
        self._patch.setattr(runtime_context, "get_context", lambda: context)
        self._patch.setattr(runtime_context, "get_parallel", lambda: parallel)
        self._patch.setattr(host_pools, "page_bytes", lambda component, _: component.bytes)
        self._patch.setattr(host_pools, "layers_by_component", lambda _: self.layers)
        group: Any = SimpleNamespace(entries=[entry])
        memory: Any = SimpleNamespace()
        return storage_setup.StorageSetup(
            SimpleNamespace(geometry=self.geometry),  # type: ignore[arg-type]
            host_pools.HostStacks(group, memory, self.stacks, pool, self.geometry),
            ServedWeights(self.root, same, self.drafts),
            metrics=False,
        )

    def identity(self) -> bytes:
        return self.setup().identity()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, root: Path) -> Server:
    return Server(monkeypatch, root)


# ---- what is around the weights ----------------------------------------------


@pytest.mark.parametrize("option", KV_OPTIONS, ids=lambda option: option.name)
def test_each_option_that_changes_kv_belongs_to_it(
    option: Any, server: Server, tmp_path: Path
) -> None:
    assert option.name in namespace_of(ServerArgs), "the engine has no such option"
    before = server.identity()
    value = tmp_path / "file"
    value.write_text("one")
    server.options[option.name] = str(value)
    one = server.identity()
    assert one != before
    if option.kind is Kind.CONTENTS:
        value.write_text("two")
        assert server.identity() != one
        moved = tmp_path / "moved"
        moved.write_text("one")
        server.options[option.name] = str(moved)
        assert server.identity() == one, "the path counts"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtypes", ["torch.bfloat16", "torch.float8_e4m3fn"]),
        ("page_bytes", [4096, 4096]),
        ("layers", [{0: 0, 2: 1}, {1: 0, 3: 1}]),
        ("geometry", Geometry(device_page=32, window=128)),
        ("geometry", Geometry(device_page=16, window=64)),
        ("layout", "page_head"),
        ("attn_tp_size", 2),
    ],
)
def test_the_layout_of_pages_belongs_to_it(server: Server, name: str, value: Any) -> None:
    before = server.identity()
    setattr(server, name, value)
    assert server.identity() != before


def test_ranks_that_have_whole_pages_share_them_however_many_there_are(server: Server) -> None:
    """DP attention over all ranks: a page is that of a server of one rank."""
    before = server.identity()
    server.tp_size = 2
    assert server.identity() == before


def test_a_directory_of_weights_beside_the_model_counts_by_its_contents(
    server: Server, tmp_path: Path
) -> None:
    experts = write_model(tmp_path / "experts", seed=7)
    server.options["kt_weight_path"] = str(experts)
    before = server.identity()
    write_tensors(experts / "model.safetensors", tensors(8))
    assert server.identity() != before


# ---- the weights -------------------------------------------------------------


def test_negated_projections_of_two_layers_are_other_weights(server: Server, root: Path) -> None:
    """In the middle of a file that keeps its size and its header."""
    before = server.identity()
    values = tensors()
    for layer in (1, 2):
        for part in "kv":
            values[f"model.layers.{layer}.self_attn.{part}_proj.weight"] *= -1
    write_tensors(root / "model.safetensors", values)
    assert server.identity() != before


@pytest.mark.parametrize("name", tensors())
def test_every_tensor_counts(server: Server, root: Path, name: str) -> None:
    before = server.identity()
    values = tensors()
    values[name] *= 1.01
    write_tensors(root / "model.safetensors", values)
    assert server.identity() != before


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_the_scale_of_a_layers_kv_counts(server: Server, root: Path, name: str) -> None:
    """In one byte a number, the same bytes mean other KV with another scale. A scale in a file
    of its own is an option like others."""
    values = {**tensors(), f"model.layers.1.self_attn.attn.{name}": np.ones((), np.float32)}
    write_tensors(root / "model.safetensors", values)
    before = server.identity()
    values[f"model.layers.1.self_attn.attn.{name}"] += 1e-6
    write_tensors(root / "model.safetensors", values)
    assert server.identity() != before


def test_one_number_of_a_small_tensor_counts(server: Server, root: Path) -> None:
    before = server.identity()
    values = tensors()
    values["model.layers.2.self_attn.k_proj.weight"][17, 23] += 1e-3
    write_tensors(root / "model.safetensors", values)
    assert server.identity() != before


@pytest.mark.parametrize("first", [0, 1 << 20, (3 << 20) + 4096, (4 << 20)])
def test_two_mebibytes_in_a_row_of_a_large_tensor_count(
    server: Server, root: Path, first: int
) -> None:
    before = server.identity()
    values = tensors()
    values[LARGE].reshape(-1)[first // 4 : (first + (2 << 20)) // 4] += 1
    write_tensors(root / "model.safetensors", values)
    assert server.identity() != before


def test_one_column_of_a_large_tensor_counts(server: Server, root: Path, tmp_path: Path) -> None:
    """16 numbers of each row of 8,192, so one sample in eight meets them."""
    wide = {LARGE: np.zeros((1024, 8192), np.float32)}
    write_tensors(root / "model.safetensors", wide)
    before = server.identity()
    for column in range(0, 8192, 1024):
        other = {LARGE: wide[LARGE].copy()}
        other[LARGE][:, column : column + 16] = 1
        write_tensors(root / "model.safetensors", other)
        assert server.identity() != before, column


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("ending", [".bin", ".pt", ".gguf"])
def test_other_formats_are_sampled_too(
    server: Server, root: Path, ending: str, place: float
) -> None:
    (root / "model.safetensors").unlink()
    data = np.random.default_rng(1).integers(0, 256, 5 << 20, np.uint8)
    path = root / f"model{ending}"
    path.write_bytes(data.tobytes())
    before = server.identity()
    first = int(place * ((5 << 20) - (1 << 20)))
    data[first : first + (1 << 20) + 4096] ^= 1
    path.write_bytes(data.tobytes())
    assert server.identity() != before


def test_a_model_in_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"a" * 1000)
    before = Server(monkeypatch, checkpoint.find(str(path))).identity()
    assert Server(monkeypatch, path).identity() == before
    path.write_bytes(b"b" * 1000)
    assert Server(monkeypatch, path).identity() != before


def test_a_broken_header_is_read_as_data(server: Server, root: Path) -> None:
    path = root / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"a" * 100_000)
    before = server.identity()
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"b" * 100_000)
    assert server.identity() != before


def test_configuration_and_code_count_the_tokenizer_does_not(server: Server, root: Path) -> None:
    before = server.identity()
    (root / "tokenizer.json").write_text('{"other": 1}')
    (root / "generation_config.json").write_text('{"temperature": 1}')
    assert server.identity() == before
    (root / "modeling_mine.py").write_text("scale = 2")
    code = server.identity()
    (root / "config.json").write_text('{"rope_theta": 20000.0}')
    assert len({before, code, server.identity()}) == 3


def test_the_same_files_elsewhere_are_the_same_model(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    """Neither the path nor inodes nor times count: servers share storage."""
    copy = tmp_path / "somewhere" / "else"
    shutil.copytree(root, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert Server(monkeypatch, copy).identity() == Server(monkeypatch, root).identity()


# ---- which files they are ----------------------------------------------------


def hub(cache: Path, commit: str, seed: int) -> None:
    """A snapshot of org/name in a cache of the hub, and the branch that points to it."""
    repository = cache / "models--org--name"
    snapshot = write_model(repository / "snapshots" / commit, seed)
    blob = repository / "blobs" / f"blob-{commit}"
    blob.parent.mkdir(exist_ok=True)
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_a_hub_name_is_its_snapshot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path
) -> None:
    cache = tmp_path / "cache"
    old, new = "1" * 40, "2" * 40
    hub(cache, old, seed=0)
    first = Server(monkeypatch, checkpoint.find("org/name", cache=str(cache))).identity()
    assert first == Server(monkeypatch, root).identity(), "a copy of it has the same contents"
    hub(cache, new, seed=1)
    moved = Server(monkeypatch, checkpoint.find("org/name", cache=str(cache))).identity()
    assert moved != first
    pinned = checkpoint.find("org/name", revision=old, cache=str(cache))
    assert Server(monkeypatch, pinned).identity() == first


@pytest.mark.parametrize("name", ["org/absent", "s3://bucket/model", "a:b/c", "not there"])
def test_what_cannot_be_found_shares_nothing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A name is not contents: each process has pages of its own, and says so."""
    found = checkpoint.find(name, cache=str(tmp_path))
    assert found is None
    setup = Server(monkeypatch, found).setup()
    assert setup.identity() == setup.identity(), "it is one server's for as long as it runs"
    assert setup.identity() != Server(monkeypatch, found).identity()
    assert "nobody can tell which weights these are" in caplog.text


def test_a_directory_without_weights_shares_nothing(server: Server, root: Path) -> None:
    """They were deleted after loading, or come from elsewhere."""
    (root / "model.safetensors").unlink()
    assert server.identity() != server.identity()


@pytest.mark.parametrize(
    ("load_format", "weight_cache", "elsewhere"),
    [("auto", "off", False), ("remote_instance", "off", True), ("auto", "attach", True)],
)
def test_weights_of_another_process_are_not_those_of_the_files(
    load_format: str, weight_cache: str, elsewhere: bool
) -> None:
    assert is_elsewhere(load_format, weight_cache) is elsewhere


def test_files_that_were_replaced_after_loading_are_not_what_is_served(
    server: Server, root: Path
) -> None:
    """Storage may be attached days after the start."""
    before = server.identity()
    running = server.setup()
    write_tensors(root / "model.safetensors", tensors(1))
    assert running.identity() not in (before, server.identity())


# ---- updates -----------------------------------------------------------------


def test_an_update_from_disk_is_what_a_start_with_it_is(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", seed=1)
    setup = Server(monkeypatch, root).setup()
    first = setup.identity()
    setup.weights.changed(Source.at(other))
    assert setup.identity() == Server(monkeypatch, other).identity() != first
    setup.weights.changed(Source.at(root))
    assert setup.identity() == first


def test_an_update_from_somewhere_is_nobodys(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """And two of them are not the same."""
    setup = Server(monkeypatch, root).setup()
    seen = {setup.identity()}
    for _ in range(2):
        setup.weights.changed(None)
        seen.add(setup.identity())
    assert len(seen) == 3


def test_an_update_with_a_part_of_the_tensors_is_nobodys(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    """The rest is what it was before, which the files do not say."""
    part = write_model(tmp_path / "part", seed=1)
    write_tensors(part / "model.safetensors", {LARGE: tensors(1)[LARGE]})
    setup = Server(monkeypatch, root).setup()
    setup.weights.changed(Source.at(part))
    assert setup.identity() != Server(monkeypatch, part).identity()


def test_a_checkpoint_that_is_gone_after_the_update_is_nobodys(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", seed=1)
    expected = Server(monkeypatch, other).identity()
    setup = Server(monkeypatch, root).setup()
    source = Source.at(other)
    shutil.rmtree(other)
    setup.weights.changed(source)
    assert setup.identity() != expected


# ---- ranks -------------------------------------------------------------------


class Ranks:
    """Agreement of two ranks that ask one after the other, each question in turn."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = [[], []]
        self.rank = 0

    def smallest(self, values: Sequence[int]) -> list[int]:
        own, other = self.asked[self.rank], self.asked[1 - self.rank]
        number = len(own)
        own.append(list(values))
        if number >= len(other):
            raise _WaitsError
        return [min(pair) for pair in zip(values, other[number], strict=True)]


class _WaitsError(Exception):
    """The other rank has not asked yet."""


def agreed(roots: Sequence[Path | None]) -> list[bytes]:
    """Digests of two ranks that loaded these: both ask again until neither waits."""
    ranks = Ranks()
    weights = [ServedWeights(root, ranks.smallest) for root in roots]
    drawn = [iter([bytes([7 * n + 1] * 16)] * 9) for n in range(2)]
    for _ in range(6):
        found = []
        for ranks.rank, one in enumerate(weights):
            ranks.asked[ranks.rank] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "urandom", lambda _, it=drawn[ranks.rank]: next(it))
                try:
                    found.append(one.digest())
                except _WaitsError:
                    continue
        if len(found) == 2:
            return found
    raise AssertionError("they never agree")


def test_ranks_with_the_same_weights_agree_on_their_contents(root: Path) -> None:
    own = checkpoint.weights(root)
    assert agreed([root, root]) == [own, own]


@pytest.mark.parametrize("other", ["unknown", "different"])
def test_ranks_that_differ_agree_on_a_name_of_nobodys(
    root: Path, tmp_path: Path, other: str
) -> None:
    second = write_model(tmp_path / "second", seed=3) if other == "different" else None
    one, two = agreed([root, second])
    assert one == two
    assert one not in (checkpoint.weights(root), second and checkpoint.weights(second))


# ---- drafts --------------------------------------------------------------------


def draft_stack(size: int = 512, layers: int = 1, kind: str = "torch.bfloat16") -> Any:
    return SimpleNamespace(
        component=0,
        layers=layers,
        kind=kind,
        has_drafts=True,
        page_bytes=lambda geometry: (size, size),
    )


def test_pages_of_other_drafts_are_others(server: Server, tmp_path: Path) -> None:
    seen = [server.identity()]
    server.geometry = Geometry(device_page=16, window=128, overlap=1)
    seen.append(server.identity())
    server.options["speculative_algorithm"] = "EAGLE3"
    assert server.identity() == seen[-1], "a draft without KV of its own stores nothing"
    for stack in (draft_stack(), draft_stack(1024), draft_stack(layers=2), draft_stack(kind="fp8")):
        server.stacks = [stack]
        seen.append(server.identity())
    server.options["speculative_algorithm"] = "STANDALONE"
    seen.append(server.identity())
    for name in drafts.OPTIONS:
        server.options[name] = "other"
        seen.append(server.identity())
    for number, name in enumerate(("one", "other")):
        server.drafts = [write_model(tmp_path / name, seed=number + 5)]
        seen.append(server.identity())
        assert server.identity() == seen[-1]
    assert len(set(seen)) == len(seen)


def test_a_draft_that_is_nowhere_shares_nothing(server: Server) -> None:
    server.drafts = [None]
    setup = server.setup()
    assert setup.identity() == setup.identity() != server.identity()
    assert setup.weights.is_nobodys


def test_after_an_update_nobody_knows_the_draft(server: Server, tmp_path: Path) -> None:
    server.drafts = [write_model(tmp_path / "draft", seed=5)]
    setup = server.setup()
    before = setup.identity()
    assert not setup.weights.is_nobodys
    setup.weights.changed(Source.at(server.root))
    assert setup.identity() != before
    assert setup.weights.is_nobodys
