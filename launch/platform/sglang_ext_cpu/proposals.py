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

        # what is computed from here on makes lengths and proposals of the next step
        positions, rows = batch.seq_lens.tolist(), verified.draft_token.tolist()
        result = original(verified, batch, *arguments, **named)
        if batch.forward_mode.is_idle() or get_parallel().attn_tp_rank:
            return result
        width = verified.draft_token_num
        lines = [
            {
                "rid": request.rid,
                "position": position,
                "tokens": rows[number * width : (number + 1) * width],
                "accepted": accepted,
            }
            for number, (request, position, accepted) in enumerate(
                zip(batch.reqs, positions, result[1].tolist(), strict=True)
            )
        ]
        # DP ranks write to one file
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        return result
