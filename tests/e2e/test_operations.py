"""What an operator may call at any time: see docs/operations.md."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from launch.server import OURS, Server
from launch.traffic import generate
from tests.e2e import test_storage
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.test_storage import TIERS, cached, flush, stored_in, when_idle
from tests.fixtures.calls import Call
from tests.fixtures.documents import begins, commands

PAGE = 16
LONG = 250
"""Tokens of an answer that has not ended when the next call arrives."""
SLOW_S = 0.05
"""Then every token takes so much longer: a caller may be as late as seconds on a busy machine."""
SEEDS = range(1, 5)


class Expected(dict[int, list[int]]):
    """Long answers to the prompts, by seed, of a server without a prefix cache.

    Attributes:
        scores: its answer to SCORE.
    """

    scores: list[list[float]]


@pytest.fixture(scope="module")
def expected(serve) -> Expected:  # noqa: ANN001
    """What a server without a prefix cache answers."""
    with serve(128, "--disable-radix-cache", tokens=8192) as server:
        # one at a time, as they are asked for: in a batch sums are rounded otherwise
        known = Expected((seed, answer(server, seed, LONG)) for seed in SEEDS)
        known.scores = server.post("/v1/score", SCORE)["scores"]
        return known


@pytest.fixture(scope="module")
def late(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ANN001
    """A server whose copies are reported a second late."""
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    options = ["--chat-template", str(template)]
    options += [*stored_in(tmp_path_factory.mktemp("pages")), "--page-size", str(PAGE)]
    options += ["--admin-api-key", "secret"]
    with serve(128, *options, tokens=8192, SGLANG_EXT_TEST_REPORT_DELAY_MS="1000") as server:
        server.key = "secret"
        yield server
        time.sleep(1.0)  # the last copies
        assert_idle_and_alive(server)


@pytest.fixture(scope="module")
def ranks(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ANN001
    """Two ranks, without storage."""
    options = [*OURS, *TIERS, "--page-size", str(PAGE), "--tp", "2", "--admin-api-key", "secret"]
    two = {**RANKS, "SGLANG_EXT_TEST_REPORT_DELAY_MS": "300"}
    with serve(128, *options, tokens=8192, **two) as server:
        server.key = "secret"
        yield server
        assert_idle_and_alive(server)


@pytest.fixture(autouse=True)
def none_left_paused(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails in a pause, or while the server is slow, fails alone."""
    yield
    for name in {"late", "ranks"} & set(request.fixturenames):
        server = request.getfixturevalue(name)
        server.post("/continue_generation", {})
        slow_down(server, 0)


def prompt(seed: int, length: int = 410) -> list[int]:
    """A random prompt."""
    return test_storage.prompt(seed, length)


def refused(call: Callable[[], Any]) -> str:
    """What the server says to a call that it refuses."""
    with pytest.raises(httpx.HTTPStatusError) as error:
        call()
    assert error.value.response.status_code == 400
    return error.value.response.text


def answer(server: Server, seed: int, length: int = 8) -> list[int]:
    """One answer."""
    tokens: list[int] = generate(server, prompt(seed), length)["output_ids"]
    return tokens


def slow_down(server: Server, seconds: float) -> None:
    """How much longer each step of a server takes from now on."""
    server.post("/slow_down", {"forward_sleep_time": seconds})


class Running:
    """A long answer that is being generated, slowly until somebody asks for it."""

    def __init__(self, server: Server, seed: int, *, tokens: int = LONG, **fields: Any) -> None:
        """``fields`` go into the request as they are."""
        self._server, self._pool, self._fields = server, ThreadPoolExecutor(1), fields
        self._length = tokens
        self._begun = threading.Event()
        slow_down(server, SLOW_S)
        self._future: Future[list[int]] = self._pool.submit(self._read, seed)
        assert self._begun.wait(180.0)

    def result(self) -> list[int]:
        """All of its tokens."""
        slow_down(self._server, 0)
        return self._future.result()

    def _read(self, seed: int) -> list[int]:
        body = {
            "input_ids": prompt(seed),
            "sampling_params": {"temperature": 0, "max_new_tokens": self._length},
            "stream": True,
            **self._fields,
        }
        url, tokens = self._server.url + "/generate", list[int]()
        with httpx.stream("POST", url, json=body, timeout=600.0) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    tokens = json.loads(line[6:])["output_ids"]
                    if len(tokens) > 2:
                        self._begun.set()
        return tokens


# ---- memory ------------------------------------------------------------------


def test_memory_is_released_right_after_an_answer(late: Server, expected) -> None:  # noqa: ANN001
    """Its copies are in flight, and what it was promised is not in storage yet."""
    assert answer(late, 1) == expected[1][:8]
    late.post("/release_memory_occupation", {})
    late.post("/resume_memory_occupation", {})
    again = generate(late, prompt(1), 8)
    assert again["output_ids"] == expected[1][:8]
    assert cached(again)["device"] == cached(again)["host"] == 0
    assert cached(again)["storage"] > 0, "the release did not wait for storage"


def test_memory_is_released_and_resumed_once(late: Server, expected) -> None:  # noqa: ANN001
    """Twice is once, and nothing is nothing; the engine fails on a resume of what it has."""
    late.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    for _ in range(2):
        late.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    for _ in range(2):
        late.post("/resume_memory_occupation", {})
    assert answer(late, 2) == expected[2][:8]


@pytest.mark.full
def test_memory_is_not_released_while_a_request_runs(late: Server, expected) -> None:  # noqa: ANN001
    running = Running(late, 1)
    late.post("/pause_generation", {"mode": "in_place"})
    said = refused(lambda: late.post("/release_memory_occupation", {}))
    assert "memory was not released" in said
    late.post("/continue_generation", {})
    assert running.result() == expected[1]


def test_memory_is_released_in_a_pause(late: Server, expected) -> None:  # noqa: ANN001
    running = Running(late, 3)
    late.post("/pause_generation", {"mode": "retract"})
    late.post("/release_memory_occupation", {})
    late.post("/resume_memory_occupation", {})
    late.post("/continue_generation", {})
    assert running.result() == expected[3]


# ---- pauses ------------------------------------------------------------------


def test_a_flush_and_new_weights_in_a_pause(late: Server, expected) -> None:  # noqa: ANN001
    """What is in flight ends although no batch runs, and what waits holds no KV."""
    running = Running(late, 4)
    late.post("/pause_generation", {"mode": "retract"})
    late.post("/flush_cache?timeout=180", {})
    model = json.loads(late.get("/model_info"))["model_path"]
    updated = late.post("/update_weights_from_disk", {"model_path": model})
    assert updated["success"], updated
    late.post("/continue_generation", {})
    assert running.result() == expected[4]


def test_new_weights_right_after_an_answer(late: Server, expected) -> None:  # noqa: ANN001
    assert answer(late, 2, 20) == expected[2][:20]
    model = json.loads(late.get("/model_info"))["model_path"]
    body = {"model_path": model}
    updated = when_idle(lambda: late.post("/update_weights_from_disk", body))
    assert updated["success"], updated
    assert answer(late, 2, 20) == expected[2][:20]


def test_a_flush_right_after_an_answer(late: Server, expected) -> None:  # noqa: ANN001
    """Without a timeout; it waits for copies and storage, not for requests."""
    assert answer(late, 3, 40) == expected[3][:40]
    # the engine's own: the batch of the answer is its last one for a moment
    when_idle(lambda: late.post("/flush_cache", {}))
    again = generate(late, prompt(3), 40)
    assert again["output_ids"] == expected[3][:40]
    assert cached(again)["storage"] > 0


def test_a_pause_in_place_keeps_what_runs(late: Server, expected) -> None:  # noqa: ANN001
    running = Running(late, 2)
    late.post("/pause_generation", {"mode": "in_place"})
    assert "Timed out" in refused(lambda: late.post("/flush_cache?timeout=1", {}))
    late.post("/continue_generation", {})
    assert running.result() == expected[2]


def test_a_pause_that_aborts(late: Server, expected) -> None:  # noqa: ANN001
    running = Running(late, 3)
    late.post("/pause_generation", {"mode": "abort"})
    tokens = running.result()
    assert len(tokens) < LONG
    assert tokens == expected[3][: len(tokens)]
    flush(late)
    late.post("/continue_generation", {})
    assert answer(late, 3) == expected[3][:8]


def test_storage_is_detached_and_attached_in_a_pause(
    late: Server,
    expected,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    running = Running(late, 1)
    late.post("/pause_generation", {"mode": "retract"})
    when_idle(lambda: late.post("/hicache/storage-backend", {}, method="DELETE"))
    when_idle(lambda: attach(late, tmp_path))
    late.post("/continue_generation", {})
    assert running.result() == expected[1]


def attach(server: Server, directory: Path, **settings: Any) -> None:
    """Attach a directory of pages."""
    extra = {"file_storage_path": str(directory), "prefetch_threshold": 16, **settings}
    body = {
        "hicache_storage_backend": "dynamic" if settings else "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config_json": json.dumps(extra),
    }
    server.post("/hicache/storage-backend", body, method="PUT")


# ---- the other calls ---------------------------------------------------------

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
WORDS = " ".join(f"t{token}" for token in prompt(1, 200))

SCORE = {"model": "m", "query": WORDS, "items": ["t7", "t8 t9"], "label_token_ids": [5, 6]}


class Way(NamedTuple):
    """A way to ask for a text: where, what is said of it, and where the answer has its words."""

    path: str
    body: Callable[[str], dict[str, Any]]
    words: Callable[[Any], str]


def chat(words: str, **fields: Any) -> dict[str, Any]:
    """A conversation that begins with these words."""
    messages = [{"role": "user", "content": words}]
    return {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


FEW = {"num_predict": 8, "temperature": 0}
WAYS = {
    "completions": Way(
        "/v1/completions",
        lambda words: {"model": "m", "prompt": words, "max_tokens": 8, "temperature": 0},
        lambda said: said["choices"][0]["text"],
    ),
    "vertex": Way(
        "/vertex_generate",
        lambda words: {
            "instances": [{"text": words}],
            "parameters": {"sampling_params": {"temperature": 0, "max_new_tokens": 8}},
        },
        lambda said: said["predictions"][0]["text"],
    ),
    "ollama": Way(
        "/api/generate",
        lambda words: {"model": "m", "prompt": words, "stream": False, "options": FEW},
        lambda said: said["response"],
    ),
    "chat": Way(
        "/v1/chat/completions", chat, lambda said: said["choices"][0]["message"]["content"]
    ),
    "sagemaker": Way("/invocations", chat, lambda said: said["choices"][0]["message"]["content"]),
    "anthropic": Way("/v1/messages", chat, lambda said: said["content"][0]["text"]),
    "ollama chat": Way(
        "/api/chat",
        lambda words: chat(words, stream=False, options=FEW),
        lambda said: said["message"]["content"],
    ),
}


def test_every_way_to_ask_gives_the_same_tokens(late: Server) -> None:
    """Each with words of its own, which are computed once and come from storage then."""
    sampling = {"temperature": 0, "max_new_tokens": 8}
    texts = {
        name: " ".join(f"t{token}" for token in prompt(100 + number, 200))
        for number, name in enumerate(WAYS)
    }

    def said(name: str) -> list[str]:
        way = WAYS[name]
        return way.words(late.post(way.path, way.body(texts[name]))).split()

    first = {name: said(name) for name in WAYS}
    flush(late)
    assert {name: said(name) for name in WAYS} == first
    for name, words in texts.items():
        plain = late.post("/generate", {"text": words, "sampling_params": sampling})["text"]
        assert first[name] == plain.split(), name


REFUSED = [
    ("POST", "/v1/embeddings", {"model": "m", "input": "t5"}, "embedding"),
    ("POST", "/v1/classify", {"model": "m", "input": "t5"}, "embedding"),
    ("POST", "/v1/rerank", {"query": "t5", "documents": ["t6"]}, "embedding"),
    ("POST", "/encode", {"text": "t5"}, "embedding"),
    ("POST", "/classify", {"text": "t5"}, "embedding"),
    ("POST", "/end_weight_update", {}, "no weight-update session is open"),
    (
        "POST",
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["eA=="]},
        "must run between",
    ),
    (
        "POST",
        "/update_weights_from_distributed",
        {"names": [], "dtypes": [], "shapes": []},
        "must run between",
    ),
    ("POST", "/update_weights_from_disk", {"model_path": "/nowhere"}, "/nowhere"),
    ("POST", "/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere"}, "--enable-lora"),
    ("POST", "/unload_lora_adapter", {"lora_name": "a"}, "--enable-lora"),
    ("POST", "/add_external_corpus", {"documents": ["a"]}, "Ngram speculative decoding"),
    ("POST", "/pd_role_switch", {"new_role": "decode"}, "--enable-pd-role-switch"),
    (
        "PUT",
        "/hicache/storage-backend",
        {"hicache_storage_backend": "file", "hicache_write_policy": "write_back"},
        "does not change --hicache-write-policy",
    ),
    (
        "PUT",
        "/hicache/storage-backend",
        {"hicache_storage_backend": "file", "hicache_storage_prefetch_policy": "never"},
        "never",
    ),
    ("POST", "/pause_generation", {"mode": "never"}, "never"),
    ("POST", "/update_weights_from_ipc", {"zmq_handles": {}}, "IPC weight update failed"),
    *(
        ("POST", f"/{verb}_expert_distribution_record", {}, "--expert-distribution-recorder-mode")
        for verb in ("start", "stop", "dump")
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "said"), REFUSED, ids=[f"{row[1]}-{row[3]}" for row in REFUSED]
)
def test_what_is_refused_by_name(
    late: Server, method: str, path: str, body: dict[str, Any], said: str
) -> None:
    assert said in refused(lambda: late.post(path, body, method=method))
    assert late.is_alive()


def test_scores_are_those_of_a_server_without_a_cache(late: Server, expected) -> None:  # noqa: ANN001
    for _ in range(2):
        assert np.array(late.post("/v1/score", SCORE)["scores"]) == pytest.approx(
            np.array(expected.scores)
        )


def test_a_session_goes_on(late: Server) -> None:
    session = late.post("/open_session", {"capacity_of_str_len": 10000})
    sampling = {"temperature": 0, "max_new_tokens": 8}
    body = {"input_ids": prompt(4), "sampling_params": sampling}
    first = late.post("/generate", {**body, "session_params": {"id": session.strip('"')}})
    asked = {"id": session.strip('"'), "rid": first["meta_info"]["id"]}
    more = late.post("/generate", {**body, "input_ids": prompt(5, 20), "session_params": asked})
    whole = [*prompt(4), *first["output_ids"], *prompt(5, 20)]
    assert more["output_ids"] == generate(late, whole, 8)["output_ids"]
    late.post("/close_session", {"session_id": session.strip('"')})


def test_calls_that_read_or_slow_down(late: Server, expected) -> None:  # noqa: ANN001
    running = Running(late, 1)
    assert late.post("/weights_checker", {"action": "checksum"})["success"]
    state = {"server_args": {"pp_max_micro_batch_size": 8}}
    late.post("/set_internal_state", state)
    late.post("/freeze_gc", {})
    late.post("/slow_down", {"forward_sleep_time": 0.001})
    late.post("/slow_down", {"forward_sleep_time": 0})
    assert "attached" in late.get("/get_hicache_l3_cache_layout")
    assert running.result() == expected[1]


def test_calls_of_the_documents_are_answered(late: Server, expected) -> None:  # noqa: ANN001
    """In their order: a pause ends before the next prompt."""
    calls = [Call.of(words) for words in commands() if begins(words) == "curl"]
    assert [call.path for call in calls].index("/pause_generation") < len(calls) - 2
    for call in calls:
        late.post(call.path, call.body or {}, method=call.method)
    assert answer(late, 1) == expected[1][:8]


# ---- two ranks ---------------------------------------------------------------


def test_an_attach_that_fails_on_one_rank(ranks: Server, expected, tmp_path: Path) -> None:  # noqa: ANN001
    """With an exception that is no start error, before the backend is there."""
    assert answer(ranks, 1) == expected[1][:8]
    fails = {
        "backend_name": "fails",
        "module_path": "tests.e2e.faulty_backend",
        "class_name": "FailsOnOneRank",
        "interface_v1": 1,
    }
    said = refused(lambda: when_idle(lambda: attach(ranks, tmp_path, **fails)))
    assert "did not start" in said
    assert answer(ranks, 2) == expected[2][:8]
    when_idle(lambda: attach(ranks, tmp_path))
    assert answer(ranks, 3) == expected[3][:8]
    flush(ranks)
    again = generate(ranks, prompt(3), 8)
    assert again["output_ids"] == expected[3][:8]
    assert cached(again)["storage"] > 0
    ranks.post("/hicache/storage-backend/clear", {})
    when_idle(lambda: ranks.post("/hicache/storage-backend", {}, method="DELETE"))


@pytest.mark.full
def test_two_ranks_release_and_pause(ranks: Server, expected) -> None:  # noqa: ANN001
    assert answer(ranks, 1) == expected[1][:8]
    ranks.post("/release_memory_occupation", {})
    ranks.post("/resume_memory_occupation", {})
    running = Running(ranks, 1)
    ranks.post("/pause_generation", {"mode": "retract"})
    ranks.post("/flush_cache?timeout=180", {})
    model = json.loads(ranks.get("/model_info"))["model_path"]
    updated = ranks.post("/update_weights_from_disk", {"model_path": model})
    assert updated["success"], updated
    ranks.post("/continue_generation", {})
    assert running.result() == expected[1]
