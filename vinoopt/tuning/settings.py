"""Which properties a device lets us move, and which of their values are worth a race."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openvino as ov
import psutil

from vinoopt.errors import DeviceError
from vinoopt.records import DeviceSpec

Values = tuple[str, ...]

_PRECISIONS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}
_MAX_STREAMS = 5


def axes(device: str, spec: DeviceSpec | None = None, *, is_stream: bool) -> dict[str, Values]:
    """Property -> values to try on this device, from what it supports and from the hardware profile.

    `is_stream` adds what matters with several requests in flight. Values of the profile replace ours.
    Properties that the device does not let us write are left out, and so are those with one value only that
    is its default. Raises `DeviceError` for a device that is not here.
    """
    core = ov.Core()
    try:
        supported: Mapping[str, str] = core.get_property(device, "SUPPORTED_PROPERTIES")
    except RuntimeError as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise DeviceError(f"{device} does not answer: {reason}; here are {core.available_devices}") from exc
    writable = {key for key, access in supported.items() if access == "RW"}
    table = _AXES.get(device.partition(".")[0], {})
    found = {key: values(core, device, is_stream) for key, values in table.items()}
    if spec is not None:
        found |= spec.tuning
    return {key: values for key, values in found.items() if key in writable and values}


def _streams(core: ov.Core, device: str, is_stream: bool) -> Values:
    if not is_stream:
        return ()
    low, high = core.get_property(device, "RANGE_FOR_STREAMS")
    return tuple(map(str, _ladder(max(int(low), 1), int(high))))


def _threads(core: ov.Core, device: str, is_stream: bool) -> Values:
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    counts = {1, max(physical // 2, 1), physical, logical}
    return tuple(str(count) for count in sorted(counts))


def _hyper_threading(core: ov.Core, device: str, is_stream: bool) -> Values:
    has_it = psutil.cpu_count() != psutil.cpu_count(logical=False)
    return ("YES", "NO") if has_it else ()


def _precisions(core: ov.Core, device: str, is_stream: bool) -> Values:
    capabilities: Sequence[str] = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(word for key, word in _PRECISIONS.items() if key in capabilities)


def _fixed(*values: str) -> Callable[[ov.Core, str, bool], Values]:
    def always(core: ov.Core, device: str, is_stream: bool) -> Values:
        return values

    return always


def _ladder(low: int, high: int) -> list[int]:
    """From low to high in doublings, the ends included, at most five steps."""
    steps = [low]
    while steps[-1] * 2 < high:
        steps.append(steps[-1] * 2)
    if high > steps[-1]:
        steps.append(high)
    return steps if len(steps) <= _MAX_STREAMS else [steps[0], *steps[1 - _MAX_STREAMS :]]


_AXES: dict[str, dict[str, Callable[[Any, str, bool], Values]]] = {
    # CPU_DENORMALS_OPTIMIZATION is left out: it changes the floating-point mode of the whole process, the user's
    # own arithmetic and the contestants measured next included.
    "CPU": {
        "ENABLE_CPU_PINNING": _fixed("NO"),
        "ENABLE_HYPER_THREADING": _hyper_threading,
        "INFERENCE_NUM_THREADS": _threads,
        "INFERENCE_PRECISION_HINT": _precisions,
        "NUM_STREAMS": _streams,
        "TBB_PARTITIONER": _fixed("STATIC", "AUTO"),
    },
    "GPU": {
        "GPU_DISABLE_WINOGRAD_CONVOLUTION": _fixed("YES"),
        "GPU_HOST_TASK_PRIORITY": _fixed("HIGH"),
        "GPU_QUEUE_THROTTLE": _fixed("LOW", "HIGH"),
        "INFERENCE_PRECISION_HINT": _precisions,
        "NUM_STREAMS": _streams,
    },
    "NPU": {
        "NPU_TURBO": _fixed("YES"),
    },
}
