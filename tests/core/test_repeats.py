"""The same prompt again: it resumes where one token is left to compute, wherever it ends."""

import numpy as np
import pytest

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from tests.core.test_index import PAGE

WINDOWS = (2 * PAGE, 2 * PAGE - 4)
LENGTHS = (6 * PAGE - 1, 6 * PAGE, 6 * PAGE + 1)


def engine_with(window: int, write: WritePolicy, **sizes: int) -> SimEngine:
    """Room for a prompt and its answer on the device, and for a few on the host."""
    defaults = {
        "device_pages": 16,
        "device_window_pages": 16,
        "host_pages": 64,
        "host_window_pages": 64,
        "pinned_share": 1,
        "low_share": 1,
    }
    return SimEngine(Geometry(PAGE, window), Sizes(write=write, **{**defaults, **sizes}))


def serve(engine: SimEngine, tokens: np.ndarray, answer: int, chunk: int) -> int:
    """A request from start to finish; returns the tokens that it found cached."""
    request = engine.start(tokens, answer=answer)
    found = request.computed
    while request.computed < request.prompt:
        engine.compute(request, min(chunk, request.prompt - request.computed))
        engine.demote()
        engine.settle()
    engine.compute(request, answer, checkpoint=False)
    engine.finish(request)
    engine.demote()
    engine.settle()
    return found


@pytest.mark.parametrize("write", WritePolicy)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("answer", [0, 3, 4 * PAGE])
@pytest.mark.parametrize("chunk", [PAGE, 5 * PAGE, 100 * PAGE])
def test_a_repeated_prompt_is_found_on_the_host(
    write: WritePolicy, length: int, window: int, answer: int, chunk: int
) -> None:
    engine = engine_with(window, write)
    tokens = np.random.default_rng(length).integers(0, 1000, length + answer)
    found = [serve(engine, tokens, answer, chunk) for _ in range(2)]
    # another prompt takes all of the device
    engine.index.evict_device(16, 16)
    found.append(serve(engine, tokens, answer, chunk))
    whole = (length - 1) // PAGE * PAGE
    assert found == [0, whole, whole]


def test_room_for_a_repeat_is_the_first_to_go() -> None:
    """An answer has gone on: what only a repeat would need never takes the place of another
    prefix, nor of the window at the end of the answer."""
    sizes = {"host_pages": 20, "host_window_pages": 4, "checkpoint_pages": 0}
    engine = engine_with(2 * PAGE, WritePolicy.WRITE_BACK, **sizes)
    answer = 4 * PAGE
    prompts = [np.random.default_rng(n).integers(0, 1000, 5 * PAGE + 1 + answer) for n in range(2)]
    for tokens in prompts:
        serve(engine, tokens, answer, 100)
        engine.index.evict_device(16, 16)
    kept = engine.index.kept.ends
    for tokens in prompts:
        pages = tokens[: len(tokens) // PAGE * PAGE].reshape(-1, PAGE)
        rows = engine.index.table.lookup(pages, None)
        assert kept[rows[-1]], "the end of an answer has given way to a repeat"
