"""The one call site of NNCF: an `ov.Model` and a plan in, a quantized `ov.Model` out."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov

from vinoopt.accuracy.datasets import Dataset
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import Device, QuantizationPlan, WeightCompressionPlan

_RANGES = {
    "minmax": "MINMAX",
    "mean_minmax": "MEAN_MINMAX",
    "quantile": "MEAN_QUANTILE",
    "histogram": "HISTOGRAM",
}
"""`QuantizationPlan.activation_range` -> a name in NNCF's `RangeEstimatorParametersSet`."""

_COPIES_OF_WEIGHTS = 1.2
"""That `nncf.quantize` takes at the least: 1.24 to 1.9 on chains of products and convolutions of 100 to 400 MiB."""
_CORRECTED_SHARE = 0.2
"""Of the samples, that accurate bias correction looks at."""


def quantize(model: ov.Model, plan: QuantizationPlan, calibration: Dataset, *, device: Device) -> ov.Model:
    """A copy of `model` with NNCF's FakeQuantize operators in place; `model` itself is left untouched.

    `calibration` gives whole model calls; at most `plan.subset_size` of them are run. With every field of
    `plan` at its default this is plain `nncf.quantize` for `device`.

    Raises `PlanError` for an unknown activation range and `CompressionError` where NNCF fails.
    """
    nncf = import_nncf()
    count = min(len(calibration), plan.subset_size)
    with _quiet(), _translated("quantization"):
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(range(count), calibration.__getitem__),
            preset=None if plan.preset is None else nncf.QuantizationPreset(str(plan.preset)),
            target_device=nncf.TargetDevice(str(device)),
            subset_size=count,
            fast_bias_correction=plan.fast_bias_correction,
            model_type=nncf.ModelType.TRANSFORMER if plan.is_transformer else None,
            ignored_scope=_ignored(nncf, plan.float_layers),
            advanced_parameters=_advanced(nncf, plan),
        )


def calibration_bytes(model: ov.Model) -> int:
    """What `quantize` takes for this model beyond the model itself at the least, in bytes."""
    weights = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
    return int(_COPIES_OF_WEIGHTS * weights)


def kept_bytes(model: ov.Model, plan: QuantizationPlan, calls: int) -> float:
    """Bytes that accurate bias correction keeps at a time with so many calls to calibrate on; infinite where sizes
    are open.

    NNCF 3.4 collects raw activations, a layer and what stands before it at a time
    (`quantization/algorithms/bias_correction/algorithm.py`, `get_raw_stat_collector`), of a fifth of the samples
    (`post_training/pipeline.py`, `bias_correction_subset_size`); counted as two of the largest tensor.
    """
    ports = [port for node in model.get_ops() if node.get_type_name() != "Constant" for port in node.outputs()]
    if any(port.get_partial_shape().is_dynamic for port in ports):
        return math.inf
    samples = max(int(_CORRECTED_SHARE * plan.subset_size), 1)
    return 2 * 4.0 * min(samples, calls) * max((math.prod(port.get_shape()) for port in ports), default=0)


def compress_weights(model: ov.Model, plan: WeightCompressionPlan) -> ov.Model:
    """A copy of `model` whose weights are stored in INT8 or INT4 and computed with in float.

    Data-free: for models that are bound by weight traffic or too big to calibrate. Raises `PlanError` for an
    unknown mode and `CompressionError` where NNCF fails.
    """
    nncf = import_nncf()
    modes = {mode.value: mode for mode in nncf.CompressWeightsMode}
    if plan.mode not in modes:
        raise PlanError(f'weight compression mode "{plan.mode}" is not one of {", ".join(sorted(modes))}')
    is_int4 = plan.mode.startswith("int4")
    with _quiet(), _translated("weight compression"):
        return nncf.compress_weights(
            model.clone(),
            mode=modes[plan.mode],
            ratio=plan.ratio if is_int4 else None,
            group_size=plan.group_size if is_int4 else None,
            ignored_scope=_ignored(nncf, plan.float_layers),
            # Rows that no group divides have smaller groups, or stay in 8 bits.
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )


def _ignored(nncf: ModuleType, names: Sequence[str]) -> Any:
    # Names were checked against the graph at the door; NNCF's own check also refuses names that other passes
    # have folded away by now.
    return nncf.IgnoredScope(names=list(names), validate=False) if names else None


def _advanced(nncf: ModuleType, plan: QuantizationPlan) -> Any:
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

    parameters = advanced.AdvancedQuantizationParameters()
    if plan.overflow_fix:
        parameters.overflow_fix = advanced.OverflowFix.ENABLE
    if plan.smooth_quant_alpha is not None:
        parameters.smooth_quant_alphas = advanced.AdvancedSmoothQuantParameters(
            convolution=-1, matmul=plan.smooth_quant_alpha
        )
    if plan.activation_range is not None:
        if plan.activation_range not in _RANGES:
            raise PlanError(f'activation range "{plan.activation_range}" is not one of {", ".join(_RANGES)}')
        chosen: RangeEstimatorParameters = getattr(
            RangeEstimatorParametersSet, _RANGES[plan.activation_range]
        )
        parameters.activations_range_estimator_params = chosen
    return parameters


def import_nncf() -> ModuleType:
    """NNCF, imported with its telemetry package out of reach: it then uses its own no-operation stub."""
    if "nncf" not in sys.modules:
        name = "openvino_telemetry"
        before = sys.modules.get(name)
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import openvino_telemetry` fail
        try:
            import nncf
        finally:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    import nncf

    return nncf  # type: ignore[no-any-return]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's own progress bars off stdout, which belongs to our data, and its notices off the terminal."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """NNCF's errors have no common root: what its code raises over a model becomes `CompressionError`."""
    from nncf import errors

    known: tuple[type[Exception], ...] = (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,  # its graph code meets shapes and operators that it was not written for
        AttributeError,
        ArithmeticError,
        AssertionError,
        *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    )
    try:
        yield
    except known as exc:
        first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise CompressionError(f"NNCF {what} failed: {first}") from exc
