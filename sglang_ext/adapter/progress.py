"""Steps of a start that may take minutes: a line from time to time when one takes long, so that
nobody takes the server for dead."""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from sglang_ext.adapter import memory_watch

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Between two lines of one step; a step that is shorter says nothing."""
_MUCH_BYTES = 4 * 10**9
"""Less memory than that is there in a few seconds."""


@contextlib.contextmanager
def progress(
    what: str, done: Callable[[], str] = lambda: "", every_s: float = EVERY_S
) -> Iterator[None]:
    """A step of the start, for the length of a with-block.

    Args:
        what: is being done, in a few words.
        done: how far it is, asked for each line, in another thread.
    """
    ended, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(every_s):
            far = done()
            logger.info(
                "sglang-ext: %s: %.0f s%s", what, time.monotonic() - began, far and f", {far}"
            )

    speaker = threading.Thread(target=say, name="sglang-ext start", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


@contextlib.contextmanager
def memory_progress(wanted: int, every_s: float = EVERY_S) -> Iterator[None]:
    """Host memory is allocated, for the length of a with-block. Another process tells: no thread
    of this one runs meanwhile.

    Args:
        wanted: bytes.
    """
    if wanted < _MUCH_BYTES:
        yield
        return
    numbers = (os.getpid(), wanted, every_s)
    command = [sys.executable, "-I", "-S", memory_watch.__file__, *map(str, numbers)]
    with contextlib.ExitStack() as ends:
        # that nobody tells is no reason not to start
        with contextlib.suppress(OSError):
            # it ends when its standard input does, which is with this process at the latest
            ends.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE))
        yield
