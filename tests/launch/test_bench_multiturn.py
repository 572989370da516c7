"""The multi-turn benchmark against a stand-in for the server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web

from launch.bench import multiturn
from launch.server import free_port

ORIGINAL_FLAGS = (
    "--disable-random-sample --request-length 2048 --output-length 1024 --num-clients 140 "
    "--num-rounds 12 --max-parallel 32 --request-rate 4 --ready-queue-policy random "
    "--disable-auto-run --enable-round-barrier --log-file metrics.jsonl"
)


def test_accepts_the_flags_of_the_original_word_for_word() -> None:
    args = multiturn.parse_args(ORIGINAL_FLAGS.split())
    assert (args.num_clients, args.num_rounds, args.max_parallel) == (140, 12, 32)
    assert (args.request_length, args.output_length, args.request_rate) == (2048, 1024, 4)
    assert args.disable_random_sample
    assert args.disable_auto_run
    assert args.enable_round_barrier
    assert args.log_file == Path("metrics.jsonl")


class Stub:
    """Answers /generate as SGLang does, and remembers the prompts."""

    def __init__(self) -> None:
        self.port = free_port()
        self.prompts: list[list[int]] = []
        self.running = 0
        self.most_running = 0
        self.fail = False

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if self.fail:
            return web.Response(status=500)
        self.prompts.append(prompt)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        response = web.StreamResponse()
        await response.prepare(request)
        for done in range(1, count + 1):
            await asyncio.sleep(0.002)
            meta = {
                "prompt_tokens": len(prompt),
                "completion_tokens": done,
                "cached_tokens_details": {"device": len(prompt) // 2, "host": len(prompt) // 4},
            }
            chunk = {"output_ids": list(range(done)), "meta_info": meta}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app)

    async def begin() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", server.port).start()

    loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def flags(stub: Stub, log: Path, *more: str) -> list[str]:
    base = f"--port {stub.port} --num-clients 4 --num-rounds 3 --request-length 8 "
    base += f"--output-length 2 --max-parallel 2 --request-rate 500 --log-file {log}"
    return [*base.split(), "--disable-auto-run", "--disable-random-sample", *more]


@pytest.mark.parametrize("policy", ["random", "fifo"])
def test_histories_grow_and_the_log_has_the_figures(
    stub: Stub, tmp_path: Path, policy: str
) -> None:
    log = tmp_path / "log.jsonl"
    more = ["--enable-round-barrier", "--sub-question-input-length", "4"]
    multiturn.main(flags(stub, log, "--ready-queue-policy", policy, *more))
    assert stub.most_running <= 2
    # first prompt 8; then history 8 + answer 2 + question 4
    assert sorted({len(prompt) for prompt in stub.prompts}) == [8, 14, 20]
    # the barrier: no second round before all first ones
    assert [len(prompt) for prompt in stub.prompts] == sorted(len(p) for p in stub.prompts)
    result = json.loads(log.read_text())
    assert result["requests"] == 12
    assert result["hit_rate"]["device"] == pytest.approx(0.5, abs=0.05)
    assert result["hit_rate"]["host"] == pytest.approx(0.25, abs=0.05)
    assert [r["round"] for r in result["rounds"]] == [0, 1, 2]
    for figures in (result["ttft_s"], result["latency_s"]):
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"]
    assert result["throughput"]["input_tokens_per_s"] > 0


def test_the_same_seed_asks_the_same_questions(stub: Stub, tmp_path: Path) -> None:
    for _ in range(2):
        multiturn.main(flags(stub, tmp_path / "log", "--seed", "5"))
    first, second = stub.prompts[:12], stub.prompts[12:]
    assert sorted(first) == sorted(second)


def test_a_failing_server_ends_the_run(stub: Stub, tmp_path: Path) -> None:
    stub.fail = True
    with pytest.raises(ExceptionGroup) as caught:
        multiturn.main(flags(stub, tmp_path / "log"))
    assert caught.group_contains(httpx.HTTPStatusError, match="500")


def test_as_a_command_it_says_what_the_server_did(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert multiturn.run_or_say_why(flags(stub, tmp_path / "log")) == 0
    capsys.readouterr()
    stub.fail = True
    assert multiturn.run_or_say_why(flags(stub, tmp_path / "log")) == 1
    said = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{stub.port}" in said[-1]
    assert "500" in said[-1]
    assert not any("Traceback" in line for line in said)
