"""The evaluation's passes really find what they ask for in the tier that they name."""

import json
from pathlib import Path

from launch import accuracy
from launch.models.text import ready_made_text
from launch.server import OURS
from tests.e2e.conftest import COMMON
from tests.fixtures.arithmetic import write_questions
from tests.fixtures.zygote import Zygote


def test_passes_come_from_their_tiers_with_the_same_answers(zygote: Zygote, tmp_path: Path) -> None:
    """The answers of a random model are wrong, and the same."""
    data = write_questions(tmp_path / "data.jsonl", 20)
    options = ["--model-path", str(ready_made_text()), *COMMON, *OURS]
    options += ["--page-size", "16", "--max-total-tokens", "2048", "--chunked-prefill-size", "512"]
    options += ["--enable-hierarchical-cache", "--hicache-ratio", "8"]
    options += ["--hicache-write-policy", "write_through", "--hicache-storage-backend", "file"]
    options += ["--hicache-storage-prefetch-policy", "wait_complete"]
    store = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "store")}
    out = tmp_path / "accuracy.json"
    ask = ["--data", str(data), "--shots", "8", "--parallel", "3", "--max-new-tokens", "8", "--yes"]
    with zygote.running(options, tmp_path / "server.log", store) as server:
        assert accuracy.main(["--url", server.url, *ask, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["differences"] == []
    found = {name: each["found_tokens"] for name, each in report["passes"].items()}
    prompts = report["passes"]["cold"]["prompt_tokens"]
    assert found["cold"]["host"] == found["cold"]["storage"] == 0
    assert found["host"]["host"] > 0.5 * prompts
    assert found["host"]["storage"] == 0
    assert found["storage"]["storage"] > 0.5 * prompts
