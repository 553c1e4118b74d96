"""The normalised model against the ONNX file run by ONNX Runtime: do they say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.errors import DataError, DeviceError
from vinoopt.frontend import preprocess
from vinoopt.frontend.normalize import SourceModel
from vinoopt.records import OutputParity, ParityReport, TensorSpec

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ImportError:  # the extra "parity" is not installed
    onnxruntime = None

Array = NDArray[Any]
Sample = Mapping[str, Array]

MISSING = "not checked: pip install vinoopt[parity]"

TOLERANCE_F32 = 1e-3
"""Both sides compute in float32 and add in another order: ~1e-6 per layer of a hundred layers, and folding
scales into weights rounds once more. A wrong layout, mean or pad is off by 1e-1 and more."""
TOLERANCE_F16 = 3e-2
"""ONNX Runtime computes such a file in half precision (11 bits, ~5e-4 per operation, a hundred layers)."""
TOLERANCE_QUANTIZED = 1e-1
"""A value at the border of two steps of an 8-bit grid may fall to either side, and the step carries on."""
TOLERANCE_INTEGER = 1e-2
"""Share of indices that may differ: equal scores are ordered by chance."""

_RANDOM = frozenset({"RandomUniform", "Multinomial"})
_FREE_DIMENSION = 2


def random_samples(source: SourceModel, count: int, *, seed: int = 0) -> list[dict[str, Array]]:
    """`count` samples of random values that fit `source.inputs`: floats from N(0, 1), images over 0-255.

    Integers are 0 or 1, which any table of embeddings has; an open dimension gets the smallest size up from
    2 that its bounds allow.
    """
    rng = np.random.default_rng(seed)
    return [{spec.name: _random(spec, rng) for spec in source.inputs} for _ in range(count)]


def check_parity(source: SourceModel, samples: Sequence[Sample]) -> ParityReport:
    """The largest difference of every output between `source.model` and its ONNX file over `samples`.

    Samples are what a user feeds, by input name; embedded preprocessing is computed apart for ONNX Runtime.
    Raises `DataError` where a sample does not fit the inputs, `DeviceError` where OpenVINO cannot run it.
    """
    if not samples:
        raise DataError("parity: no samples to compare on")
    if onnxruntime is None:
        return ParityReport(checked=False, ok=False, reason=MISSING)
    if any(node.get_type_name() in _RANDOM for node in source.model.get_ops()):
        return ParityReport(checked=False, ok=False, reason="not checked: the model draws random numbers")
    for sample in samples:
        _check_names(source, sample)
    fed = [_explicit(source, sample) for sample in samples]
    try:
        session = _session(source)
        expected = [session.run(None, each) for each in fed]
    except _onnxruntime_errors() as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        return ParityReport(checked=False, ok=False, reason=f"not checked: ONNX Runtime: {first}")
    actual = list(_run_openvino(source, samples))
    outputs = tuple(
        _compare(spec, _tolerance(source), [row[i] for row in expected], [row[i] for row in actual])
        for i, spec in enumerate(source.outputs)
    )
    reasons = [
        f'output "{each.name}" differs by {each.max_rel_error:.2g} of its range (up to {each.tolerance:g} is '
        f"rounding){'; ' + each.note if each.note else ''}"
        for each in outputs
        if not each.ok
    ]
    return ParityReport(
        checked=True, ok=not reasons, reason="; ".join(reasons), samples=len(samples), outputs=outputs
    )


def _check_names(source: SourceModel, sample: Sample) -> None:
    wanted = {spec.name for spec in source.inputs}
    if set(sample) != wanted:
        raise DataError(f"parity: a sample holds {sorted(sample)} where the model takes {sorted(wanted)}")


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    found = (getattr(_state, name) for name in dir(_state))
    own = tuple(each for each in found if isinstance(each, type) and issubclass(each, Exception))
    return (*own, RuntimeError)


def _session(source: SourceModel) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(source.path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _explicit(source: SourceModel, sample: Sample) -> dict[str, Array]:
    """What the ONNX file itself takes: the sample with its preprocessing computed outside the graph."""
    resolved = preprocess.resolve(source.preprocess, source.model_inputs)
    return {
        spec.name: preprocess.compute(resolved[spec.name], sample[spec.name], spec)
        if spec.name in resolved
        else sample[spec.name]
        for spec in source.model_inputs
    }


def _run_openvino(source: SourceModel, samples: Sequence[Sample]) -> Iterator[list[Array]]:
    try:
        compiled = ov.Core().compile_model(source.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        for sample in samples:
            results = request.infer([sample[spec.name] for spec in source.inputs])
            yield [np.array(results[port]) for port in compiled.outputs]
    except RuntimeError as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        raise DeviceError(f"{source.path}: OpenVINO cannot run it on CPU: {lines[-1]}") from exc


def _tolerance(source: SourceModel) -> float:
    if source.quantized:
        return TOLERANCE_QUANTIZED
    return TOLERANCE_F16 if source.onnx.has_half_precision else TOLERANCE_F32


def _compare(
    spec: TensorSpec, tolerance: float, expected: Sequence[Array], actual: Sequence[Array]
) -> OutputParity:
    worst_abs, worst_rel, notes = 0.0, 0.0, []
    is_integer = expected[0].dtype.kind in "iub" and tolerance < TOLERANCE_QUANTIZED
    for want, got in zip(expected, actual, strict=True):
        if want.shape != got.shape:
            notes.append(f"shape {list(got.shape)} instead of {list(want.shape)}")
            worst_abs = worst_rel = float("inf")
            continue
        if want.size == 0:
            continue
        a, b = want.astype(np.float64), got.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            notes.append("not finite in other places")
            worst_abs = worst_rel = float("inf")
            continue
        finite = np.isfinite(a)
        error = np.abs(a - b)[finite]
        largest = float(error.max(initial=0.0))
        scale = float(np.abs(a[finite]).max(initial=0.0))
        worst_abs = max(worst_abs, largest)
        relative = float(np.mean(error != 0)) if is_integer else largest / max(scale, 1e-6)
        worst_rel = max(worst_rel, relative)
    limit = TOLERANCE_INTEGER if is_integer else tolerance
    return OutputParity(
        name=spec.name,
        ok=worst_rel <= limit,
        max_abs_error=worst_abs,
        max_rel_error=worst_rel,
        tolerance=limit,
        note=notes[0] if notes else "",
    )


def _random(spec: TensorSpec, rng: np.random.Generator) -> Array:
    shape = tuple(_size(dim) for dim in spec.shape if dim != "...")
    if spec.layout is not None:
        return rng.integers(0, 256, shape).astype(spec.dtype)
    if spec.dtype.startswith(("float", "bfloat")):
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _size(dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    low, _, high = dim.partition("..")
    if dim == "?":
        return _FREE_DIMENSION
    return min(max(int(low or 0), _FREE_DIMENSION), int(high) if high else max(int(low), _FREE_DIMENSION))
