"""A scheduler around a simulated engine: requests in line, admitted when there is room."""

from collections import deque
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.device.victims import Spare
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import DeviceFullError, SimRequest
from sglang_ext.testing.sizes import Sizes

_MOST_STEPS = 100_000
_CHUNK = 512


class Scheduler:
    """As the engine's: one prefill chunk or one decode in a step, retraction when decoding finds
    no room.

    Args:
        tokens: of the device.
        ratio: host memory, as the engine's ``--hicache-ratio``.
        most_running: as the engine's ``--max-running-requests``.

    Attributes:
        found: cached tokens of each request when it was first admitted.
    """

    def __init__(
        self,
        page: int,
        tokens: int,
        ratio: int,
        write: WritePolicy,
        seed: int = 0,
        most_running: int = 1000,
    ) -> None:
        geometry = Geometry(page, 127)
        pages = tokens // geometry.page_tokens
        windows = pages * 4 // 5
        sizes = Sizes(
            device_pages=pages,
            device_window_pages=windows,
            host_pages=ratio * pages,
            host_window_pages=ratio * windows,
            checkpoint_pages=32 * geometry.window_pages,
            write=write,
            extent_pages=4,
            spare=Spare.for_device(pages, windows, has_host=ratio > 0),
            as_on_a_server=True,
        )
        self.engine = SimEngine(geometry, sizes, seed=seed)
        self._most_running = most_running
        self.found: dict[Hashable, int] = {}
        self._queue: deque[tuple[Hashable, NDArray[np.int64], int]] = deque()
        self._running: list[tuple[Hashable, SimRequest]] = []

    def submit(self, key: Hashable, tokens: NDArray[np.int64], answer: int) -> None:
        """A request gets in line; ``answer`` of its tokens are the answer that it will get."""
        self._queue.append((key, tokens, answer))

    def run(self) -> None:
        """Until all requests have their answers."""
        for _ in range(_MOST_STEPS):
            if not (self._queue or self._running):
                return
            self._step()
        raise AssertionError("requests wait for ever")

    def _step(self) -> None:
        engine = self.engine
        engine.pass_time(1.0)
        engine.ledger.commit(engine.report())
        engine.demote()
        self._admit()
        try:
            prefills = [request for _, request in self._running if not self._has_prompt(request)]
            for request in prefills:
                engine.compute(request, min(_CHUNK, request.prompt - request.computed))
            for key, request in [] if prefills else list(self._running):
                # the last token of an answer is never computed
                if request.computed < len(request.tokens) - 1:
                    engine.compute(request, 1, checkpoint=False)
                if request.computed >= len(request.tokens) - 1:
                    engine.finish(request)
                    self._running.remove((key, request))
        except DeviceFullError:
            key, request = self._running.pop()
            engine.abort(request)
            self._queue.appendleft((key, request.tokens, len(request.tokens) - request.prompt))

    @staticmethod
    def _has_prompt(request: SimRequest) -> bool:
        return request.computed >= request.prompt

    def _admit(self) -> None:
        while self._queue and all(self._has_prompt(request) for _, request in self._running):
            if len(self._running) == self._most_running:
                return
            key, tokens, answer = self._queue[0]
            if not self._fits(tokens[: len(tokens) - answer]):
                return
            self._queue.popleft()
            request = self.engine.start(tokens, answer=answer)
            self.found.setdefault(key, request.computed)
            self._running.append((key, request))

    def _fits(self, prompt: NDArray[np.int64]) -> bool:
        """Room for a prompt, and for part of the answers that are being made."""
        index, geometry = self.engine.index, self.engine.geometry
        page = geometry.page_tokens
        match = index.match(prompt[: (len(prompt) - 1) // page * page].reshape(-1, page), None)
        hold = index.hold(match.rows[: match.device_pages])
        full = self.engine.device.free_pages() + index.table.device.n_evictable
        windows = self.engine.device.free_window_pages() + index.table.swa_device.n_evictable
        hold.release()
        need = -(-len(prompt) // page) - match.device_pages + 2
        answers = sum((len(r.tokens) - r.computed) * 3 // 10 // page for _, r in self._running)
        need_windows = min(need, _CHUNK // page) + geometry.window_pages
        need_windows += match.window_pages_to_pin + 2 * len(self._running)
        return full >= need + answers and windows >= need_windows
