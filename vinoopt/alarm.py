"""A time limit that ends work from within, wherever it is, and signals that arrive safely beside OpenVINO."""

from __future__ import annotations

import ctypes
import platform
import signal
import sys
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
        _take_off_alternate_stack(signal.SIGALRM)
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


def make_interrupts_safe() -> None:
    """Lets Ctrl-C arrive as `KeyboardInterrupt` after OpenVINO has been used; without it the process may die instead.

    Every CPU plugin gives the thread that loads it an alternate signal stack (for AMX, `SigAltStackSetup`). On its
    end it unmaps that stack and, if it is the thread's current one, puts back what it had found. Two plugins that
    do not end in the opposite order leave the thread with a stack that is no longer mapped (seen with OpenVINO
    2026.4.1, as soon as two `ov.Core` were used and the first one ended first), and Python has its handlers run
    there: the next signal is a segmentation fault. Handlers of Python only set a flag, so the thread's own stack
    will do. To be repeated after `signal.signal`; not to be called while another thread changes the handler of
    Ctrl-C.
    """
    if callable(signal.getsignal(signal.SIGINT)):
        _take_off_alternate_stack(signal.SIGINT)


class _SigAction(ctypes.Structure):
    """`struct sigaction` of glibc and musl on the machines in `_KNOWN_MACHINES`."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_KNOWN_MACHINES = ("x86_64", "aarch64")
_SA_ONSTACK = 0x08000000  # asm-generic/signal-defs.h


def _take_off_alternate_stack(number: int) -> None:
    if not sys.platform.startswith("linux") or platform.machine() not in _KNOWN_MACHINES:
        return  # the plugin sets a stack on Linux only
    libc = ctypes.CDLL(None)
    action = _SigAction()
    if libc.sigaction(number, None, ctypes.byref(action)) == 0 and action.flags & _SA_ONSTACK:
        action.flags &= ~_SA_ONSTACK
        libc.sigaction(number, ctypes.byref(action), None)
