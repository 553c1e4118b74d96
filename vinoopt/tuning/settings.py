"""Which properties a device lets us move, and which of their values are worth a race."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
import psutil

from vinoopt.errors import DeviceError
from vinoopt.hardware.detect import cpu_flags
from vinoopt.records import DeviceSpec
from vinoopt.toolchains.host import reason_of

Values = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What decides which values of a property are worth trying."""

    core: Any
    device: str
    is_stream: bool
    """Whether several requests are in flight."""
    has_stored_weights: bool
    """Whether the model keeps weights of matrix products in fewer bits than it computes in."""


Rule = Callable[[Asked], Values]

_PRECISIONS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}
_MAX_STREAMS = 5
_EFFICIENCY_CORES = Path("/sys/devices/cpu_atom")


def axes(
    device: str, spec: DeviceSpec | None = None, *, is_stream: bool, model: ov.Model | None = None
) -> dict[str, Values]:
    """Property -> values to try on this device, from what it supports and from the hardware profile.

    `is_stream` adds what matters with several requests in flight; `model` what matters for its weights. Values of the
    profile replace ours. Properties that the device does not let us write are left out, and so are those that the
    hardware or the model gives no choice about. Raises `DeviceError` for a device that is not here.
    """
    core = ov.Core()
    try:
        supported: Mapping[str, str] = core.get_property(device, "SUPPORTED_PROPERTIES")
    except RuntimeError as exc:
        raise DeviceError(f"{device} does not answer: {reason_of(exc)}; here are {core.available_devices}") from exc
    writable = {key for key, access in supported.items() if access == "RW"}
    asked = Asked(
        core=core,
        device=device,
        is_stream=is_stream,
        has_stored_weights=model is not None and _has_stored_weights(model),
    )
    table = {key: rule for key, rule in _AXES.get(device.partition(".")[0], {}).items() if key in writable}
    found = {key: rule(asked) for key, rule in table.items()}
    if spec is not None:
        found |= {key: values for key, values in spec.tuning.items() if key in writable}
    return {key: values for key, values in found.items() if values}


def _has_stored_weights(model: ov.Model) -> bool:
    """Whether a matrix product reads a constant of 8 or fewer bits through conversions: weight compression."""
    return any(
        _is_stored(node.input_value(1).get_node())
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
    )


def _is_stored(node: ov.Node) -> bool:
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant" and node.get_element_type().bitwidth <= 8)


def _other_hint(asked: Asked) -> Values:
    return ("LATENCY",) if asked.is_stream else ("THROUGHPUT",)


def _streams(asked: Asked) -> Values:
    if not asked.is_stream:
        return ()
    low, high = asked.core.get_property(asked.device, "RANGE_FOR_STREAMS")
    return tuple(map(str, _ladder(max(int(low), 1), int(high))))


def _requests(asked: Asked) -> Values:
    """Requests that the throughput hint plans for: fewer of them mean less waiting for each."""
    if not asked.is_stream:
        return ()
    _, high = asked.core.get_property(asked.device, "RANGE_FOR_STREAMS")
    return tuple(map(str, _ladder(1, max(int(high), 1))))


def _threads(asked: Asked) -> Values:
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    counts = {1, max(physical // 2, 1), physical, logical}
    return tuple(str(count) for count in sorted(counts))


def _hyper_threading(asked: Asked) -> Values:
    has_it = psutil.cpu_count() != psutil.cpu_count(logical=False)
    return ("YES", "NO") if has_it else ()


def _core_types(asked: Asked) -> Values:
    """Performance and efficiency cores, where there are both.

    Linux says so; elsewhere a thread count that is neither that of the cores nor twice that gives it away.
    """
    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False) or 1
    is_hybrid = _EFFICIENCY_CORES.exists() or logical not in (physical, 2 * physical)
    return ("PCORE_ONLY", "ECORE_ONLY") if is_hybrid else ()


def _sparse_rates(asked: Asked) -> Values:
    """Share of zeros from which fully connected INT8 weights are kept packed; needs AMX."""
    return ("0.8", "0.5") if "amx_int8" in cpu_flags() else ()


def _dynamic_quantization(asked: Asked) -> Values:
    return ("0", "32", "64", "128") if asked.has_stored_weights else ()


def _precisions(asked: Asked) -> Values:
    capabilities: Sequence[str] = asked.core.get_property(asked.device, "OPTIMIZATION_CAPABILITIES")
    return tuple(word for key, word in _PRECISIONS.items() if key in capabilities)


def _fixed(*values: str) -> Rule:
    return lambda asked: values


def _ladder(low: int, high: int) -> list[int]:
    """From low to high in doublings, the ends included, at most five steps."""
    steps = [low]
    while steps[-1] * 2 < high:
        steps.append(steps[-1] * 2)
    if high > steps[-1]:
        steps.append(high)
    return steps if len(steps) <= _MAX_STREAMS else [steps[0], *steps[1 - _MAX_STREAMS :]]


_AXES: dict[str, dict[str, Rule]] = {
    # CPU_DENORMALS_OPTIMIZATION is left out: it changes the floating-point mode of the whole process, the user's
    # own arithmetic and the contestants measured next included.
    "CPU": {
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": _sparse_rates,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _dynamic_quantization,
        "ENABLE_CPU_PINNING": _fixed("NO"),
        "ENABLE_HYPER_THREADING": _hyper_threading,
        "INFERENCE_NUM_THREADS": _threads,
        "INFERENCE_PRECISION_HINT": _precisions,
        "NUM_STREAMS": _streams,
        "PERFORMANCE_HINT": _other_hint,
        "PERFORMANCE_HINT_NUM_REQUESTS": _requests,
        "SCHEDULING_CORE_TYPE": _core_types,
        "TBB_PARTITIONER": _fixed("STATIC", "AUTO"),
    },
    "GPU": {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _dynamic_quantization,
        "GPU_DISABLE_WINOGRAD_CONVOLUTION": _fixed("YES"),
        "GPU_HOST_TASK_PRIORITY": _fixed("HIGH"),
        "GPU_QUEUE_PRIORITY": _fixed("HIGH"),
        "GPU_QUEUE_THROTTLE": _fixed("LOW", "HIGH"),
        "INFERENCE_PRECISION_HINT": _precisions,
        "NUM_STREAMS": _streams,
        "PERFORMANCE_HINT": _other_hint,
        "PERFORMANCE_HINT_NUM_REQUESTS": _requests,
    },
    "NPU": {
        "NPU_COMPILATION_MODE_PARAMS": _fixed(
            "optimization-level=3", "optimization-level=2 performance-hint-override=latency"
        ),
        "NPU_QDQ_OPTIMIZATION": _fixed("YES"),
        "NPU_TURBO": _fixed("YES"),
        "PERFORMANCE_HINT": _other_hint,
    },
}
