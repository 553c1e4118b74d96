"""A mirror is trusted only after it has equalled OpenVINO on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
import torch

from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.plain_float import spelled_out
from vinoopt.distillation.rules import failing, wide
from vinoopt.errors import DistillationError

FLOAT_TOLERANCE = 1e-4
"""Root mean square of the difference over the output's: sums of float32 in another order."""
CHANNEL_TOLERANCE = 10.0
"""How many times that for a single channel, beside whose sums its own may be small."""
_QUIET = 0.1
"""Of the usual channel's size: one of less counts as so large."""
STORED_TOLERANCE = 1e-3
"""The same for graphs whose constants are stored in float16, which OpenVINO may scale weights in, or whose outputs
are handed over in it."""
HALF_TOLERANCE = 2e-2
"""The same for graphs that compute in float16: the mirror computes in float32."""
ROUNDED_TOLERANCE = 2e-2
"""With rounding quantizers, where last bits decide between neighbouring levels; or twice as far as OpenVINO's own
integer kernels are from the graph, where that is more."""
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def check_equality(mirror: Mirror, calls: Sequence[Sequence[Any]]) -> None:
    """Raises `DistillationError` where the mirror is not the model that it was made of.

    Twice for a quantized model: with quantizers that only clamp, to float rounding; and as they are, where a last
    bit can move a value to the next level. Both against the graph computed by OpenVINO in float.
    """
    model = mirror.model
    tolerance = _tolerance(model)
    is_quantized = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    mirror.rounds = False
    try:
        expected = run(spelled_out(model, rounds=False), calls, _EXACT)
        _compare(mirror, expected, calls, tolerance)
        _compare(mirror, expected, calls, CHANNEL_TOLERANCE * tolerance, apart_by=channel_departure)
    finally:
        mirror.rounds = True
    if is_quantized:
        exact = run(spelled_out(model), calls, _EXACT)
        kernels = run(model, calls, {"INFERENCE_PRECISION_HINT": "f32"})
        pairs = [pair for own, its in zip(kernels, exact, strict=True) for pair in zip(own, its, strict=True)]
        apart = max((departure(own, its) for own, its in pairs), default=0.0)
        if not np.isfinite(apart):
            raise DistillationError(
                "the quantized model's outputs are not finite, so there is nothing to train from; quantize it with "
                "other ranges"
            )
        _compare(mirror, exact, calls, max(ROUNDED_TOLERANCE, 2 * apart))


def _tolerance(model: ov.Model) -> float:
    """By what holds values in 16 bits: operators, constants and the model's doors alone, or nothing."""
    in_halves = [
        node
        for node in model.get_ops()
        if any(value.get_element_type().get_type_name() in ("f16", "bf16") for value in node.outputs())
    ]
    if not all(map(_only_stores, in_halves)):
        return HALF_TOLERANCE
    return STORED_TOLERANCE if in_halves else FLOAT_TOLERANCE


def _only_stores(node: ov.Node) -> bool:
    """Whether nothing is computed in the node's own type."""
    if node.get_type_name() == "Convert":
        readers = node.output(0).get_target_inputs()
        return all(reader.get_node().get_type_name() == "Result" for reader in readers)
    return node.get_type_name() in ("Constant", "Parameter", "Result")


def check_batches(mirror: Mirror, calls: Sequence[Sequence[Any]]) -> bool:
    """Whether several calls put into one give what they give one by one."""
    if len(calls) < 2 or len({tuple(tuple(x.shape) for x in call) for call in calls}) > 1:
        return False
    if any(x.ndim == 0 for x in calls[0]):
        return False
    mirror.rounds = False
    try:
        single = [np.concatenate(each) for each in _outputs(mirror, calls)]
        with torch.no_grad():
            joined = [torch.cat(list(values)) for values in zip(*calls, strict=True)]
            together = [value.numpy() for value in mirror([wide(x) for x in joined], mirror.results)]
    except (DistillationError, RuntimeError, IndexError, ValueError):  # the graph is made for one call
        return False
    finally:
        mirror.rounds = True
    return all(
        a.shape == b.shape and departure(a, b) <= FLOAT_TOLERANCE for a, b in zip(together, single, strict=True)
    )


def _compare(
    mirror: Mirror,
    expected: Sequence[Sequence[np.ndarray[Any, Any]]],
    calls: Sequence[Sequence[Any]],
    tolerance: float,
    *,
    apart_by: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float] | None = None,
) -> None:
    measure = apart_by or departure
    for number, (own, its) in enumerate(zip(_outputs(mirror, calls), expected, strict=True)):
        apart = max(map(partial(_apart, measure), own, its))
        if not apart <= tolerance:
            raise DistillationError(
                f"the model's image in PyTorch departs from OpenVINO's output {number} by {apart:.2g} of its size "
                f"(tolerance {tolerance:.2g}), so it is not trained"
            )


def _apart(
    measure: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float],
    own: np.ndarray[Any, Any],
    its: np.ndarray[Any, Any],
) -> float:
    return measure(own, its) if own.shape == its.shape else float("inf")


def departure(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference over that of what is expected; over finite values."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(a[~finite], e[~finite], equal_nan=True):
        return float("inf")
    size = float(np.sqrt(np.mean(e[finite] ** 2))) if finite.any() else 0.0
    return float(np.sqrt(np.mean((a[finite] - e[finite]) ** 2))) / max(size, 1e-12) if finite.any() else 0.0


def channel_departure(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """The largest `departure` of a single channel: large ones must not hide that small ones differ.

    Channels are the shortest dimension behind the first, as in losses.
    """
    sizes = {axis: size for axis, size in enumerate(expected.shape) if axis and size > 1}
    axis = min(sizes, key=lambda each: sizes[each], default=None)
    if axis is None:
        return departure(actual, expected)
    a, e = (np.moveaxis(np.asarray(v, np.float64), axis, 0).reshape(sizes[axis], -1) for v in (actual, expected))
    finite = np.isfinite(e)
    a, e = (np.where(finite, values, 0.0) for values in (a, e))
    counts = np.maximum(finite.sum(1), 1)
    sizes_of, errors = (np.sqrt((values**2).sum(1) / counts) for values in (e, a - e))
    return float((errors / np.maximum(sizes_of, max(_QUIET * float(np.median(sizes_of)), 1e-12))).max())


def _outputs(mirror: Mirror, calls: Sequence[Sequence[Any]]) -> list[list[np.ndarray[Any, Any]]]:
    """Every output over all calls; see `_joined`."""
    with torch.no_grad():
        values = [mirror([wide(x) for x in call], mirror.results) for call in calls]
    return [_joined([v[i].numpy() for v in values]) for i in range(len(mirror.results))]


def run(
    model: ov.Model, calls: Sequence[Sequence[Any]], properties: dict[str, str]
) -> list[list[np.ndarray[Any, Any]]]:
    """Every output over all calls, by OpenVINO on the CPU; see `_joined`."""
    with failing("running the model in OpenVINO"):
        compiled = ov.Core().compile_model(model, "CPU", properties)
        values = [[np.array(v) for v in compiled([x.numpy() for x in call]).values()] for call in calls]
    return [_joined([v[i] for v in values]) for i in range(len(compiled.outputs))]


def _joined(values: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """One array of all calls, or one of each where their shapes differ."""
    return [np.concatenate(values)] if values[0].ndim and len({v.shape for v in values}) == 1 else values
