"""The most memory that this process has held."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The high-water mark of this process's resident memory, its libraries included.

    Of Linux's two the one in `status`: that of `getrusage` begins with the parent's.
    """
    if sys.platform.startswith("linux"):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
