"""What a draft has proposed, at each step in which its target verifies.

A draft whose KV is wrong changes no token, for the target has the last word, and a draft with
random weights is accepted by chance alone, with right KV and with wrong. Its proposals do show it.

With ``EXT_CPU_PROPOSALS=FILE`` every verified request adds a line to the file, in JSON: its
``rid``; ``position``, how many of its tokens have KV; ``tokens``, the last of it and the drafts
behind; ``accepted``, how many of these stand. Of ranks that share a request the first one writes.
"""

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "EXT_CPU_PROPOSALS"
_SAMPLE = "sglang.srt.speculative.eagle_utils.eagle_sample"
_DFLASH = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"


def install() -> None:
    """Hook what samples after a verification, if the variable is set."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = os.environ.get(VARIABLE)
    if path is None:
        return
    log = _Log(Path(path))
    HookRegistry.register(_SAMPLE, log.sample, HookType.AROUND)
    HookRegistry.register(f"{_DFLASH}.forward_batch_generation", log.step, HookType.AROUND)
    HookRegistry.register(f"{_DFLASH}._accept_block", log.accept, HookType.AROUND)


class _Log:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._requests: Any = ()

    def sample(
        self, original: Any, verified: Any, batch: Any, *arguments: Any, **named: Any
    ) -> Any:
        result = original(verified, batch, *arguments, **named)
        if not batch.forward_mode.is_idle():
            self._write(batch.reqs, batch.seq_lens, verified.draft_token, result[1])
        return result

    def step(self, original: Any, worker: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        """Whose drafts DFLASH verifies: what accepts them is not told."""
        self._requests = batch.reqs
        return original(worker, batch, *arguments, **named)

    def accept(self, original: Any, worker: Any, **named: Any) -> Any:
        result = original(worker, **named)
        _, stand, *_ = result
        self._write(self._requests, named["prefix_lens"], named["candidates"], stand)
        return result

    def _write(self, requests: Any, lengths: Any, drafts: Any, accepted: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().attn_tp_rank != 0:
            return
        proposals = drafts.view(len(requests), -1).tolist()
        lines = [
            {"rid": request.rid, "position": length, "tokens": tokens, "accepted": stand}
            for request, length, tokens, stand in zip(
                requests, lengths.tolist(), proposals, accepted.tolist(), strict=True
            )
        ]
        # DP ranks write to one file
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
