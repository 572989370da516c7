"""Windows of a path: where a request can resume, and which of them are worth keeping."""

import numpy as np
from numba.core.types import int64, void

from sglang_ext.core.compiled.arrays import FLAGS
from sglang_ext.core.compiled.build import compiled


@compiled(int64(FLAGS, int64))
def deepest_resume(usable, window):
    """See ``window.deepest_resume``."""
    run, best = 0, usable.size
    for i in range(usable.size - 1, -1, -1):
        if usable[i]:
            run += 1
            if run == window:
                return best
        else:
            run, best = 0, i
    return best


@compiled(void(FLAGS, int64, FLAGS))
def complete_windows(usable, window, out):
    """See ``window.complete_windows``."""
    missing = -1
    for i in range(usable.size):
        if not usable[i]:
            missing = i
        out[i] = i - missing >= window or missing < 0


@compiled(int64(FLAGS, int64, int64))
def next_complete(complete, last, interval):
    """The boundary up to ``interval`` after ``last`` that is furthest away, or else the first
    one beyond; of those where a window is complete."""
    for boundary in range(min(last + interval, complete.size), last, -1):
        if complete[boundary - 1]:
            return boundary
    for boundary in range(last + interval + 1, complete.size + 1):
        if complete[boundary - 1]:
            return boundary
    return complete.size + 1


@compiled(void(FLAGS, FLAGS, int64, FLAGS))
def resume_points(marked, complete, interval, keep):
    """Pages of a path whose windows are worth keeping.

    Those are its end, where the conversation goes on; pages after which prefixes diverge;
    and as many of the others that no two are further apart than ``interval`` pages: who
    branches off anywhere then computes at most that much again. Further apart are only
    those between which no window is complete.

    Args:
        marked: what was worth keeping before the path grew.
        complete: the window that ends with this page exists.
        interval: 0 for no bound.
        keep: prefixes diverge after this page, and its window exists; changed to the result.
    """
    n = keep.size
    # boundaries, that is pages before the resume point; the last one is the end
    points = np.empty(n + 1, dtype=np.int64)
    count = 0
    for i in range(n):
        if i + 1 == n or (marked[i] and complete[i]):
            points[count] = i + 1
            count += 1
    last = 0
    for number in range(count):
        point = points[number]
        while interval > 0 and point - last > interval:
            following = next_complete(complete, last, interval)
            if following >= point:
                break
            keep[following - 1] = True
            last = following
        needed = number + 1 == count or (interval > 0 and points[number + 1] - last > interval)
        if complete[point - 1] and (needed or keep[point - 1]):
            keep[point - 1] = True
            last = point
