"""What a layer costs by arithmetic: its products, its bytes, and the time that a profile's peaks leave room for.

The roofline (Williams, Waterman, Patterson: "Roofline: an insightful visual performance model", CACM 2009)
takes the longer of computing and moving data, layer by layer. It knows no launch overhead, no cache and no
half-filled vector, so it is a lower bound and good for ranking, never a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import openvino as ov

from vinoopt.errors import ShapeError
from vinoopt.records import DeviceSpec, Evidence, Precision, Record

SOURCE = (
    "roofline of the profile's peak rates and bandwidth: a lower bound without launch overhead and caches"
)

_BYTES = {
    Precision.F32: 4.0,
    Precision.F16: 2.0,
    Precision.BF16: 2.0,
    Precision.INT8: 1.0,
    Precision.INT4: 0.5,
}
_INTEGERS = frozenset({Precision.INT8, Precision.INT4})
# Without arithmetic of their own: folded into their producer, or a change of view.
_FREE = frozenset({"Parameter", "Result", "Constant", "ReadValue", "Assign", "ShapeOf"})
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Convert"})
# Executed in the registers of the layer before them; only a further input has to be read.
_FUSED_NAMES = """
    Abs Add BatchNormInference Ceiling Clamp Divide Elu Erf Exp FakeQuantize Floor Gelu HSigmoid HSwish HardSigmoid
    Maximum Minimum Mish Multiply Negative PRelu Power Relu Round Selu Sigmoid Sign SoftPlus Sqrt SquaredDifference
    Subtract Swish Tanh
"""
_FUSED = frozenset(_FUSED_NAMES.split())
_CONSTANT_CARRIERS = frozenset({"Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "Transpose"})
# Quantized in, quantized out: NNCF puts no second quantizer behind them.
_PASSING = frozenset({"Concat", "MaxPool", "Pad", "Split", "VariadicSplit", "StridedSlice", "Slice"})
_NOT_MODELLED = frozenset({"TensorIterator", "Loop", "If"})


class LayerCost(Record):
    """What one layer of a model with fixed shapes has to compute and to move."""

    name: str
    type: str
    macs: int
    """Products that are added up; two operations each."""
    weights: int
    """Elements of constants that the layer reads."""
    stored_bytes: float
    """Of them, as f32 or as the integers that they are stored in."""
    activations: int
    """Elements of tensors that the layer reads and writes."""
    is_modelled: bool = True
    """False for control flow, whose body is not counted."""


class LayerTime(Record):
    """The roofline of one layer."""

    name: str
    type: str
    precision: Precision
    """What it is computed in, which is not what was asked for where the device lacks that."""
    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The longer of the two."""
        return max(self.compute_ms, self.memory_ms)


class Roofline(Record):
    """A modelled latency; `latency_ms` is None where the profile lacks the figures named in `missing`."""

    latency_ms: float | None
    layers: tuple[LayerTime, ...] = ()
    evidence: Evidence = Evidence.MODELLED
    source: str = SOURCE
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def layer_costs(model: ov.Model) -> tuple[LayerCost, ...]:
    """The cost of every layer that computes or moves data, in execution order.

    Elementwise layers and quantizers run inside the layer before them and appear only where they read a second
    tensor; reshapes are free. Raises `ShapeError` where a shape is not fixed.
    """
    constants = _constant_nodes(model)
    return tuple(cost for node in model.get_ordered_ops() for cost in _cost(node, constants))


def layers_with_products(model: ov.Model) -> tuple[str, ...]:
    """Names of the layers that multiply and add, in execution order."""
    return tuple(
        node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() in _MACS
    )


def layer_precisions(model: ov.Model) -> dict[str, Precision]:
    """Layers with products whose activations and weights are both quantized, by name: all are INT8."""
    return {
        node.get_friendly_name(): Precision.INT8
        for node in model.get_ordered_ops()
        if node.get_type_name() in _MACS and all(_is_quantized(port) for port in node.input_values()[:2])
    }


def roofline(
    model: ov.Model,
    spec: DeviceSpec,
    *,
    precisions: Mapping[str, Precision] | None = None,
    float_precision: Precision | None = None,
    on_vector_units: Collection[str] = (),
) -> Roofline:
    """The latency that the device's peak rates and bandwidth leave room for, layer by layer.

    `precisions` names layers that are not computed in `float_precision`; None: what `layer_precisions` finds.
    `on_vector_units` names layers whose kernel leaves matrix and INT8 arithmetic unused: they compute at the
    rate of f32. A format without native arithmetic counts as the device's fastest float format, with a note. Raises
    `ShapeError` where a shape is not fixed.
    """
    quantized = layer_precisions(model)
    wanted = quantized if precisions is None else precisions
    floats = [name for name in spec.precisions if name not in _INTEGERS]
    default = float_precision or (floats[0] if floats else Precision.F32)
    missing = _missing(spec, {default, *wanted.values()}, floats)
    costs = layer_costs(model)
    notes = _notes(spec, costs, {default, *wanted.values()})
    if missing or spec.bandwidth_gb_per_s is None:
        return Roofline(latency_ms=None, missing=missing, notes=notes)
    bandwidth = spec.bandwidth_gb_per_s.value
    layers = tuple(
        _layer_time(
            cost,
            precision := _executed(spec, wanted.get(cost.name, default)),
            # Weights of a layer that was to be INT8 are unpacked once where the device computes it in float.
            is_packed=precision in _INTEGERS or cost.name not in quantized,
            bandwidth=bandwidth,
            gops=_rate(spec, precision, is_slow=cost.name in on_vector_units),
        )
        for cost in costs
    )
    return Roofline(latency_ms=sum(layer.ms for layer in layers), layers=layers, notes=notes)


# --------------------------------------------------------------------------- time


def _rate(spec: DeviceSpec, precision: Precision, *, is_slow: bool) -> float:
    slow = spec.peak_gops.get(Precision.F32) if is_slow else None
    return (slow or spec.peak_gops[precision]).value


def _layer_time(
    cost: LayerCost, precision: Precision, *, is_packed: bool, bandwidth: float, gops: float
) -> LayerTime:
    operations, weights = 2.0 * cost.macs, cost.weights * _BYTES[precision]
    moved = (min(weights, cost.stored_bytes) if is_packed else weights) + cost.activations * _BYTES[precision]
    return LayerTime(
        name=cost.name,
        type=cost.type,
        precision=precision,
        compute_ms=operations / (gops * 1e6) if cost.macs else 0.0,
        memory_ms=moved / (bandwidth * 1e6),
    )


def _executed(spec: DeviceSpec, wanted: Precision) -> Precision:
    """The format that the device computes in where `wanted` was asked for."""
    if wanted in spec.precisions:
        return wanted
    return next(name for name in spec.precisions if name not in _INTEGERS)


def _missing(spec: DeviceSpec, wanted: set[Precision], floats: list[Precision]) -> tuple[str, ...]:
    if not floats:
        return ("a float format among precisions",)
    executed = {_executed(spec, each) for each in wanted}
    missing = [f"peak_gops.{name}" for name in sorted(executed) if name not in spec.peak_gops]
    return (*missing, *([] if spec.bandwidth_gb_per_s is not None else ["bandwidth_gb_per_s"]))


def _notes(spec: DeviceSpec, costs: tuple[LayerCost, ...], wanted: set[Precision]) -> tuple[str, ...]:
    notes = [
        f"{name} has no native arithmetic on {spec.name} and counts as its fastest float format"
        for name in sorted(wanted - set(spec.precisions))
    ]
    unknown = sorted({cost.type for cost in costs if not cost.is_modelled})
    if unknown:
        notes.append(f"the bodies of {', '.join(unknown)} are not counted")
    return tuple(notes)


# --------------------------------------------------------------------------- cost


def _cost(node: ov.Node, constants: set[str]) -> Iterator[LayerCost]:
    kind = node.get_type_name()
    if kind in _FREE or kind in _VIEWS or node.get_friendly_name() in constants:
        return
    sources = [port for port in node.input_values() if port.get_node().get_type_name() != "Constant"]
    weights = [port for port in sources if port.get_node().get_friendly_name() in constants]
    plain = [port for port in node.input_values() if port.get_node().get_type_name() == "Constant"]
    tensors = [port for port in sources if port not in weights]
    outputs = list(node.outputs())
    if kind in _FUSED:
        # The first tensor is still in registers, and so is the result.
        tensors, outputs = tensors[1:], []
        if not tensors:
            return
    ports = [*tensors, *outputs]
    held = [port for port in (*weights, *plain) if kind not in _FUSED]
    yield LayerCost(
        name=node.get_friendly_name(),
        type=kind,
        macs=_MACS[kind](node) if kind in _MACS else 0,
        weights=sum(_size(port) for port in held),
        stored_bytes=sum(_size(port) * _element_bytes(port) for port in held),
        activations=sum(_size(port) for port in ports),
        is_modelled=kind not in _NOT_MODELLED,
    )


def _element_bytes(port: ov.Output) -> float:
    """Of an element of the constant behind a chain of operators that unpack it."""
    node = port.get_node()
    while node.get_type_name() in _CONSTANT_CARRIERS:
        node = node.input_value(0).get_node()
    kind = node.get_output_element_type(0)
    return kind.bitwidth / 8 if kind.is_integral() else _BYTES[Precision.F32]


def _constant_nodes(model: ov.Model) -> set[str]:
    """Names of layers, other than constants, that depend on constants and fixed shapes alone: they run once."""
    known: set[str] = set()
    for node in model.get_ordered_ops():
        inputs = node.input_values()
        if node.get_type_name() == "ShapeOf":
            is_known = not inputs[0].get_partial_shape().is_dynamic
        else:
            sources = [port.get_node() for port in inputs]
            names = [each.get_friendly_name() for each in sources if each.get_type_name() != "Constant"]
            is_known = bool(inputs) and known.issuperset(names)
        if is_known:
            known.add(node.get_friendly_name())
    return known


def _shape(port: ov.Output) -> tuple[int, ...]:
    shape = port.get_partial_shape()
    if shape.is_dynamic:
        name = port.get_node().get_friendly_name()
        raise ShapeError(f"{name} has the shape {shape}: costs need fixed shapes; give every input a size")
    return tuple(shape.to_shape())


def _size(port: ov.Output) -> int:
    return math.prod(_shape(port))


def _is_quantized(port: ov.Output) -> bool:
    """Whether a tensor passes a quantizer on its way here, or comes from an integer constant."""
    node = port.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return bool(node.get_element_type().is_integral())
    if kind == "Concat":
        return all(_is_quantized(each) for each in node.input_values())
    if kind in _CONSTANT_CARRIERS or kind in _PASSING or kind in _VIEWS:
        return kind == "FakeQuantize" or _is_quantized(node.input_value(0))
    return False


# --------------------------------------------------------------------------- products


def _convolution(node: ov.Node) -> int:
    return _size(node.output(0)) * math.prod(_shape(node.input_value(1))[1:])


def _group_convolution(node: ov.Node) -> int:
    return _size(node.output(0)) * math.prod(_shape(node.input_value(1))[2:])


def _deconvolution(node: ov.Node) -> int:
    return _size(node.input_value(0)) * math.prod(_shape(node.input_value(1))[1:])


def _group_deconvolution(node: ov.Node) -> int:
    return _size(node.input_value(0)) * math.prod(_shape(node.input_value(1))[2:])


def _matmul(node: ov.Node) -> int:
    shape = _shape(node.input_value(0))
    is_transposed = len(shape) > 1 and bool(node.get_attributes().get("transpose_a", False))
    return _size(node.output(0)) * shape[-2 if is_transposed else -1]


def _attention(node: ov.Node) -> int:
    query, key, value = (_shape(node.input_value(number)) for number in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(first: int) -> Callable[[ov.Node], int]:
    """Products of a cell or sequence whose two weights are inputs `first` and `first + 1`."""

    def macs(node: ov.Node) -> int:
        steps = math.prod(_shape(node.input_value(0))[:-1])
        return steps * sum(_size(node.input_value(number)) for number in (first, first + 1))

    return macs


_MACS: dict[str, Callable[[ov.Node], int]] = {
    "Convolution": _convolution,
    "GroupConvolution": _group_convolution,
    "ConvolutionBackpropData": _deconvolution,
    "GroupConvolutionBackpropData": _group_deconvolution,
    "MatMul": _matmul,
    "ScaledDotProductAttention": _attention,
    "LSTMCell": _recurrent(3),
    "GRUCell": _recurrent(2),
    "RNNCell": _recurrent(2),
    "LSTMSequence": _recurrent(4),
    "GRUSequence": _recurrent(3),
    "RNNSequence": _recurrent(3),
}
