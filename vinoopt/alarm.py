"""A time limit that ends work from within, wherever it is."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TimeIsUp(BaseException):
    """The time limit of the block has passed; not an `Exception`, so that no library takes it for a failure."""


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Raises `TimeIsUp` inside the block at `deadline`, in `time.monotonic` seconds; at once where that has passed.

    Like Ctrl-C it comes between two steps of Python code: a single long call of a library ends first. It needs the
    main thread and a system with interval timers whose alarm nobody else uses; elsewhere nothing is raised, and
    the block has to look at the clock by itself.
    """
    if deadline is None or not _can_ring():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _can_ring() -> bool:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return False
    own: Any = (signal.SIG_DFL, signal.SIG_IGN)
    return signal.getsignal(signal.SIGALRM) in own and signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
