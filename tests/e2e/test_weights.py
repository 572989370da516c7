"""Weights and adapters that change, with a storage that outlives them, on real servers."""

import base64
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import weights_under_load
from launch.server import Server
from launch.tiny_model import ready_made
from launch.traffic import generate
from launch.weights_under_load import Answers, answer_all, go_back_and_forth, update, wrong
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.test_storage import cached, flush, prompt, stop_gracefully, stored_in

PAGE = ("--page-size", "16")
RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
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


def test_what_is_stored_of_weights_ends_with_them(
    serve,  # noqa: ANN001
    models: list[Path],
    expected: list[Answers],
    tmp_path: Path,
) -> None:
    """Updates from disk there and back, from tensors, one that fails, one without a flush; then
    a server of the first weights."""
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

        with pytest.raises(urllib.error.HTTPError):
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
        stop_gracefully(server)
    with serve(128, *options, tokens=8192) as server:
        assert answer_all(server, ASKED) == expected[0]
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
