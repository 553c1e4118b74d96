"""What about this machine makes its times doubtful: power, frequency, other load."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import psutil

from vinoopt.errors import TargetError
from vinoopt.records import Device, Evidence

OTHER_LOAD = 0.1
STEAL = 0.01
DRIFT = 0.05
SCATTER = 0.1
CLOCK_FALL = 0.1
ISA_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BUSY = ("user", "nice", "system", "irq", "softirq")
"""Kinds of processor time; a system has some of them."""
_UNCAPPED = ("", "ALL", "DEFAULT")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class Watch:
    """Observes the machine from its making until `warnings` is called."""

    def __init__(self) -> None:
        self._clock = time.monotonic()
        self._own = _own_seconds()
        self._all = psutil.cpu_times()
        self._before = _standing_warnings()
        self._clock_mhz = _clock_mhz()

    def warnings(self) -> tuple[str, ...]:
        """What was wrong with the machine meanwhile, as sentences with figures."""
        capacity = max(time.monotonic() - self._clock, 1e-3) * (psutil.cpu_count() or 1)
        now = psutil.cpu_times()
        busy = sum(getattr(now, kind, 0.0) - getattr(self._all, kind, 0.0) for kind in _BUSY)
        other = (busy - (_own_seconds() - self._own)) / capacity
        steal = (getattr(now, "steal", 0.0) - getattr(self._all, "steal", 0.0)) / capacity
        found = list(self._before)
        if other > OTHER_LOAD:
            found.append(f"other processes used {other:.0%} of the processor during the run")
        if steal > STEAL:
            found.append(f"the hypervisor withheld {steal:.0%} of the processor during the run")
        return (*found, *clock_warnings(self._clock_mhz, _clock_mhz()))


def clock_warnings(before_mhz: float | None, after_mhz: float | None) -> tuple[str, ...]:
    """A sentence where the processor's clock fell during the run, as it does when it gets hot; None: not told."""
    if not before_mhz or not after_mhz or after_mhz >= (1 - CLOCK_FALL) * before_mhz:
        return ()
    return (f"the processor's clock fell from {before_mhz:.0f} to {after_mhz:.0f} MHz during the run",)


def round_warnings(name: str, rounds_ms: Sequence[float]) -> tuple[str, ...]:
    """Sentences about times that scatter, or that rise from the first third of the run to the last."""
    values = np.asarray(rounds_ms)
    middle = float(np.median(values))
    third = max(len(values) // 3, 1)
    drift = float(np.median(values[-third:]) / np.median(values[:third])) - 1
    scatter = 1.4826 * float(np.median(np.abs(values - middle))) / middle
    found = []
    if drift > DRIFT:
        found.append(f"{name}: times rose by {drift:.0%} during the run (throttling or growing load)")
    if scatter > SCATTER:
        found.append(f"{name}: rounds scatter by {scatter:.0%}; the machine is not quiet")
    return tuple(found)


def require_device(name: str) -> Device:
    """The kind of a device that OpenVINO lists on this machine, as `GPU.1`; raises `TargetError` for another."""
    listed = ov.Core().available_devices
    kind = name.partition(".")[0]
    if kind not in list(Device) or name not in {*listed, *(each.partition(".")[0] for each in listed)}:
        raise TargetError(f"OpenVINO lists no {name} on this machine; it lists {', '.join(listed)}")
    return Device(kind)


def evidence_here() -> Evidence:
    """`EMULATED` while oneDNN is capped to another CPU's instruction set, else `MEASURED`."""
    capped = any(os.environ.get(name, "").upper() not in _UNCAPPED for name in ISA_CAPS)
    return Evidence.EMULATED if capped else Evidence.MEASURED


def _standing_warnings() -> tuple[str, ...]:
    """What is known before the first inference; what a system does not tell is left out."""
    found = []
    if _GOVERNOR.is_file() and (governor := _GOVERNOR.read_text().strip()) != "performance":
        found.append(f'the frequency governor is "{governor}", not "performance"')
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None and battery.power_plugged is False:
        found.append("the machine runs on battery")
    return tuple(found)


def _clock_mhz() -> float | None:
    """The mean clock of all cores, where the system tells it."""
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):
        return None
    return float(found.current) if found is not None else None


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
