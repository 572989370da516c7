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


def install() -> None:
    """Hook what samples after a verification, if the variable is set."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = os.environ.get(VARIABLE)
    if path is not None:
        HookRegistry.register(_SAMPLE, _Log(Path(path)).sample, HookType.AROUND)


class _Log:
    def __init__(self, path: Path) -> None:
        self._path = path

    def sample(
        self, original: Any, verified: Any, batch: Any, *arguments: Any, **named: Any
    ) -> Any:
        from sglang.srt.runtime_context import get_parallel

        result = original(verified, batch, *arguments, **named)
        if not batch.forward_mode.is_idle() and get_parallel().attn_tp_rank == 0:
            self._write(verified, batch, result[1].tolist())
        return result

    def _write(self, verified: Any, batch: Any, accepted: list[int]) -> None:
        lengths = batch.seq_lens.tolist()
        proposals = verified.draft_token.view(len(accepted), -1).tolist()
        lines = [
            {"rid": request.rid, "position": length, "tokens": tokens, "accepted": stand}
            for request, length, tokens, stand in zip(
                batch.reqs, lengths, proposals, accepted, strict=True
            )
        ]
        # DP ranks write to one file
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
