"""Weights and adapters that change, with a storage that outlives them, on real servers."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.models.tiny import ready_made
from launch.server import Server
from launch.traffic import generate
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.test_storage import cached, flush, prompt, stop_gracefully, stored_in, when_idle
from tests.soak import weights_under_load
from tests.soak.weights_under_load import Answers, go_back_and_forth, wrong

PAGE = ("--page-size", "16")
ASKED = [prompt(40, 810), *weights_under_load.prompts(20)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in their weights alone."""
    second = tmp_path_factory.mktemp("models") / "second"
    return [ready_made(128), weights_under_load.second_model(second)]


@pytest.fixture(scope="module")
def expected(serve, models: list[Path]) -> list[Answers]:  # noqa: ANN001
    """What they answer without a cache."""

    def start(*options: str) -> Any:
        return serve(128, *options, *PAGE)

    return weights_under_load.without_cache(start, models, ASKED)


def ask(server: Server, number: int) -> tuple[list[int], int]:
    """(answer, tokens from storage) of a prompt."""
    result = generate(server, ASKED[number], weights_under_load.ANSWER)
    return result["output_ids"], cached(result)["storage"]


def update(server: Server, model: Path, **fields: Any) -> None:
    """Load other weights, behind an answer."""
    when_idle(lambda: weights_under_load.update(server, model, **fields))


def test_what_is_stored_of_weights_ends_with_them(
    serve,  # noqa: ANN001
    models: list[Path],
    expected: list[Answers],
    tmp_path: Path,
) -> None:
    """Updates from disk there and back, from tensors, one that fails, one without a flush."""
    options = [*stored_in(tmp_path / "pages"), *PAGE]
    with serve(128, *options, tokens=8192) as server:
        assert ask(server, 0) == (expected[0][0], 0)
        flush(server)
        assert ask(server, 0) == (expected[0][0], 800)

        update(server, models[1])
        assert ask(server, 0) == (expected[1][0], 0)
        assert ask(server, 1)[0] == expected[1][1]
        flush(server)
        assert ask(server, 0) == (expected[1][0], 800), "its own pages are found again"

        update(server, models[0])
        assert ask(server, 0) == (expected[0][0], 800), "so are those of the first weights"

        with pytest.raises(httpx.HTTPStatusError):
            update(server, tmp_path / "nowhere")
        flush(server)
        assert ask(server, 0) == (expected[0][0], 800), "nothing has changed"

        send_tensors(server, models[1])
        assert ask(server, 0) == (expected[1][0], 0), "whose these are nobody knows"
        flush(server)
        assert ask(server, 0) == (expected[1][0], 800)

        # the engine keeps what is on device and host if it is told to: it is of nobody's weights
        update(server, models[0], flush_cache=False)
        generate(server, [*ASKED[0], *prompt(41, 400)], 8)
        mixed = generate(server, [*ASKED[0], *prompt(41, 400)], 8)
        assert cached(mixed)["storage"] == 0
        flush(server)
        assert ask(server, 0) == (expected[0][0], 800)
        other = generate(server, [*ASKED[0], *prompt(41, 400)], 8)
        assert cached(other)["storage"] == 0, "it was not stored"
        assert_idle_and_alive(server)


def send_tensors(server: Server, model: Path) -> None:
    """An update of all weights by a trainer."""
    from sglang.srt.utils import MultiprocessingSerializer

    # the other strategy hands descriptors to children alone
    sharing = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensors = list(load_file(model / "model.safetensors").items())
    payload = base64.b64encode(MultiprocessingSerializer.serialize(tensors)).decode()
    server.post("/begin_weight_update", {})
    server.post("/update_weights_from_tensor", {"serialized_named_tensors": [payload]})
    server.post("/end_weight_update", {})
    torch.multiprocessing.set_sharing_strategy(sharing)


@pytest.mark.full
@pytest.mark.parametrize("tp", [1, 2])
def test_weights_that_change_under_load(
    serve,  # noqa: ANN001
    models: list[Path],
    expected: list[Answers],
    tmp_path: Path,
    tp: int,
) -> None:
    """Eight clients; every answer is that of the weights that were there."""
    options = [*stored_in(tmp_path), *PAGE, *(("--tp", "2") if tp > 1 else ())]

    def start() -> Any:
        return serve(128, *options, tokens=8192, **(RANKS if tp > 1 else {}))

    outcome = go_back_and_forth(start, models, ASKED, clients=8, updates=3)
    assert not wrong(outcome.replies, outcome.spans, expected)
    assert sum(reply.from_storage for reply in outcome.replies) > 0
    assert outcome.afterwards == expected[0]
    assert outcome.afterwards_from_storage > 0


# ---- adapters ----------------------------------------------------------------


def write_adapter(root: Path, seed: int) -> Path:
    """A LoRA adapter of the tiny model: of layers whose adapters the engine can run on a CPU."""
    root.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    widths = {"self_attn.o_proj": (64, 64), "mlp.down_proj": (128, 64)}
    tensors = {}
    for layer in range(4):
        for name, (narrow, wide) in widths.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (8, narrow)), ("B", (wide, 8))):
                values = torch.randn(shape, generator=generator) / 8
                tensors[f"{path}.lora_{part}.weight"] = values
    save_file(tensors, root / "adapter_model.safetensors")
    targets = sorted(name.split(".")[1] for name in widths)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def ask_adapter(server: Server, name: str | None) -> tuple[list[int], int]:
    """(answer, tokens from storage) of the first prompt."""
    fields = {"lora_path": name} if name else {}
    result = generate(server, ASKED[0], weights_under_load.ANSWER, **fields)
    return result["output_ids"], cached(result)["storage"]


def test_adapters_in_storage_go_by_their_contents(serve, tmp_path: Path) -> None:  # noqa: ANN001
    """An adapter is replaced under its name and path; then the old one is loaded under another
    name while the server runs."""
    one, two = write_adapter(tmp_path / "one", 1), write_adapter(tmp_path / "two", 2)
    place = tmp_path / "place"
    lora = ("--lora-backend", "torch_native", "--disable-overlap-schedule", *PAGE)
    both = ("--lora-paths", f"one={one}", f"two={two}")
    with serve(128, "--disable-radix-cache", *lora, *both, tokens=16384) as server:
        base, first, second = (ask_adapter(server, name)[0] for name in (None, "one", "two"))
    assert len({tuple(answer) for answer in (base, first, second)}) == 3
    options = [*stored_in(tmp_path / "pages"), *lora, "--lora-paths", f"a={place}"]
    shutil.copytree(one, place)
    with serve(128, *options, tokens=8192) as server:
        assert ask_adapter(server, "a") == (first, 0)
        assert ask_adapter(server, None) == (base, 0)
        assert_idle_and_alive(server)
        stop_gracefully(server)
    write_adapter(place, 2)
    with serve(128, *options, tokens=8192) as server:
        assert ask_adapter(server, "a") == (second, 0)
        assert ask_adapter(server, None) == (base, 800)
        server.post("/load_lora_adapter", {"lora_name": "b", "lora_path": str(one)})
        assert ask_adapter(server, "b") == (first, 800)
        assert_idle_and_alive(server)
