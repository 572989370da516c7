"""The process that hands requests to DP ranks asks for the next one without a pause, and keeps a
core busy. Where there are few cores, the ranks need it."""

from typing import Any

_LOOP = "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop"
_WAIT_MS = 1000
"""Its watchdog is fed as often."""


def install() -> None:
    """Let it wait for requests."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_LOOP, event_loop, HookType.REPLACE)


def event_loop(controller: Any) -> None:
    """Hand each request on when it comes."""
    from sglang.srt.managers.data_parallel_controller import sock_recv

    requests = controller.recv_from_tokenizer
    while True:
        controller.soft_watchdog.feed()
        if requests.poll(_WAIT_MS):
            controller._request_dispatcher(sock_recv(requests))
