"""Operator rules of the coupling: layers with weights, elementwise operators, pooling, norms.

A rule reads the labels of its inputs, emits links and freezes, and sets the labels of its outputs. `RULES` is
complete: an operator that is not in it freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov

from vinoopt.compression.constants import constant_value, integers
from vinoopt.compression.coupling import Trace
from vinoopt.compression.layer_rules import (
    attention,
    convolution,
    convolution_backprop,
    einsum,
    group_convolution,
    group_convolution_backprop,
    matmul,
)
from vinoopt.compression.shape_rules import SHAPE_RULES

Rule = Callable[[Trace, ov.Node], None]

# fmt: off
UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceiling", "Clamp", "Convert", "ConvertLike",
    "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HSigmoid", "HSwish", "HardSigmoid", "Identity",
    "IsFinite", "IsInf", "IsNaN", "Log", "LogicalNot", "Mish", "Negative", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Sinh", "SoftPlus", "SoftSign", "Sqrt", "Swish", "Tan", "Tanh",
)
ELEMENTWISE = (
    "Add", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Divide", "Equal", "FakeQuantize", "FloorMod",
    "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr", "LogicalXor", "Maximum",
    "Minimum", "Mod", "Multiply", "NotEqual", "Power", "Select", "SquaredDifference", "Subtract",
)
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogicalAnd", "ReduceLogicalOr", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum",
)
# fmt: on


CUTTABLE = frozenset(
    getattr(ov.Type, name)
    for name in ("boolean", "f16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
)
"""Types whose values numpy holds one by one."""


def _broadcasts(node: ov.Node) -> str:
    return f"'{node.get_friendly_name()}' broadcasts it"


def parameter(trace: Trace, node: ov.Node) -> None:
    """Inputs keep their shape."""
    trace.put(node, trace.fixed_dims(node.output(0), f"model input '{node.get_friendly_name()}'"))


def constant(trace: Trace, node: ov.Node) -> None:
    """Every index of a constant is a free atom; of a vector with several readers each has its own copy."""
    name = node.get_friendly_name()
    if node.get_element_type() not in CUTTABLE:
        trace.put(node, trace.fixed_dims(node.output(0), f"'{name}' is of type {node.get_element_type()}"))
        return
    shape = node.get_output_shape(0)
    if sum(size > 1 for size in shape) <= 1 and len(node.output(0).get_target_inputs()) > 1:
        trace.shared.add(node.get_name())
        trace.put(node, trace.fixed_dims(node.output(0), f"'{name}' has several readers"))
        return
    where = f"'{name}' is too long to be channels"
    trace.put(node, tuple(trace.atoms(size, where) for size in shape))


def result(trace: Trace, node: ov.Node) -> None:
    """Outputs keep their shape."""
    for labels in trace.dims(node, 0) or ():
        trace.freeze(labels, f"model output '{node.input_value(0).get_node().get_friendly_name()}'")
    trace.put(node, trace.fixed_dims(node.output(0), "model output"))


def unary(trace: Trace, node: ov.Node) -> None:
    """Labels pass."""
    trace.put(node, trace.dims(node, 0))


def elementwise(trace: Trace, node: ov.Node) -> None:
    """Operators that broadcast as numpy does link what they bring together."""
    inputs = trace.all_dims(node)
    if inputs is None or node.get_attributes().get("auto_broadcast", "numpy") == "pdpd":
        trace.freeze_node(node, "broadcasting that is not numpy's, or unknown rank")
        return
    trace.put(node, trace.broadcast(inputs, _broadcasts(node)))


def prelu(trace: Trace, node: ov.Node) -> None:
    """The slope lies on axis 1 where it is one value per channel, else broadcasts."""
    inputs = trace.all_dims(node)
    if inputs is None:
        trace.freeze_node(node, "unknown rank")
        return
    data, slope = inputs
    if len(slope) == 1 and len(data) > 1 and slope[0] is not None:
        on_channels = data[1] is not None and data[1].size == slope[0].size
        if on_channels:
            trace.link(data[1], slope[0], f"slope of '{node.get_friendly_name()}'")
        elif slope[0].size > 1:
            trace.freeze_node(node, "slope does not lie on the channels")
            return
        else:
            trace.freeze(slope[0], "one slope for all channels")
        trace.put(node, data)
        return
    trace.put(node, trace.broadcast((data, slope), _broadcasts(node)))


# --------------------------------------------------------------------------- pooling, reductions, norms


def pool(trace: Trace, node: ov.Node) -> None:
    """Channels pass, windows stay."""
    dims = trace.dims(node, 0)
    if dims is None:
        trace.freeze_node(node, "unknown rank")
        return
    for labels in dims[2:]:
        trace.freeze(labels, f"window of '{node.get_friendly_name()}'")
    out = (*dims[:2], *trace.window_dims(node))
    if node.get_output_size() > 1 and node.output(1).get_target_inputs():
        trace.freeze_node(node, "the positions it found are used")
        return
    trace.put(node, *(out for _ in node.outputs()))


def grid_sample(trace: Trace, node: ov.Node) -> None:
    """Channels pass; where they are sampled stays."""
    inputs = trace.all_dims(node)
    if inputs is None or len(inputs[0]) < 2:
        trace.freeze_node(node, "unknown rank")
        return
    data, grid = inputs
    for labels in (*data[2:], *grid[1:]):
        trace.freeze(labels, f"grid of '{node.get_friendly_name()}'")
    trace.link(data[0], grid[0], f"grid of '{node.get_friendly_name()}'")
    trace.put(node, (data[0], data[1], *trace.window_dims(node)))


def axes_of(trace: Trace, node: ov.Node, rank: int) -> list[int] | None:
    """The axes an operator works along: its second input, or its attribute; None where they are not constant."""
    if node.get_input_size() > 1:
        value = constant_value(node.input_value(1))
    else:
        attributes = node.get_attributes()
        value = attributes.get("reduction_axes", attributes.get("axes", attributes.get("axis")))
    if value is None:
        return None
    return [int(axis) % rank for axis in np.atleast_1d(np.asarray(value)).ravel()]


def reduction(trace: Trace, node: ov.Node) -> None:
    """What is reduced stays, the rest passes."""
    dims = trace.dims(node, 0)
    axes = None if dims is None else axes_of(trace, node, max(len(dims), 1))
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    why = f"{node.get_type_name()} '{node.get_friendly_name()}' runs over it"
    for axis in axes:
        trace.freeze(dims[axis], why)
    if node.get_attributes()["keep_dims"]:
        out = [trace.fixed(1, why) if axis in axes else labels for axis, labels in enumerate(dims)]
    else:
        out = [labels for axis, labels in enumerate(dims) if axis not in axes]
    trace.put(node, tuple(out))


def along_axes(trace: Trace, node: ov.Node) -> None:
    """Softmax, norms, cumulative sums: the axes they run along stay, all others pass."""
    dims = trace.dims(node, 0)
    axes = None if dims is None else axes_of(trace, node, max(len(dims), 1))
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    for axis in axes:
        trace.freeze(dims[axis], f"{node.get_type_name()} '{node.get_friendly_name()}' runs over it")
    trace.put(node, dims)


def roll(trace: Trace, node: ov.Node) -> None:
    """What is rolled stays, the rest passes."""
    dims, axes = trace.dims(node, 0), integers(node, 2)
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    for axis in axes:
        trace.freeze(dims[axis], f"'{node.get_friendly_name()}' rolls it")
    trace.put(node, dims)


def batch_norm(trace: Trace, node: ov.Node) -> None:
    """Its statistics go with the channels."""
    inputs = trace.all_dims(node)
    if inputs is None or len(inputs[0]) < 2:
        trace.freeze_node(node, "unknown rank")
        return
    for dims in inputs[1:]:
        trace.link(inputs[0][1], dims[0], f"statistics of '{node.get_friendly_name()}'")
    trace.put(node, inputs[0])


def shape_of(trace: Trace, node: ov.Node) -> None:
    """The value stays that of the whole model (surgery sees to it), so nothing is tied to it."""
    trace.dims(node, 0)
    trace.put(node, trace.fixed_dims(node.output(0), f"shape '{node.get_friendly_name()}'"))


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **dict.fromkeys(UNARY, unary),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "MVN", "NormalizeL2", "CumSum", "LRN"), along_axes),
    **dict.fromkeys(("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"), pool),
    "BatchNormInference": batch_norm,
    "Einsum": einsum,
    "GridSample": grid_sample,
    "Constant": constant,
    "Convolution": convolution,
    "ConvolutionBackpropData": convolution_backprop,
    "GroupConvolution": group_convolution,
    "GroupConvolutionBackpropData": group_convolution_backprop,
    "MatMul": matmul,
    "PRelu": prelu,
    "Parameter": parameter,
    "Result": result,
    "Roll": roll,
    "ScaledDotProductAttention": attention,
    "ShapeOf": shape_of,
}


def trace_model(ops: Sequence[ov.Node]) -> Trace:
    """Walk a graph front to back and collect what the rules say."""
    trace = Trace()
    for node in ops:
        if node.get_type_name() == "Constant" or (
            node.get_input_size() > 0
            and node.get_type_name() != "ShapeOf"
            and all(trace.is_constant(node, port) for port in range(node.get_input_size()))
        ):
            trace.constants.add(node.get_name())
        rule = RULES.get(node.get_type_name())
        if rule is None:
            trace.freeze_node(node, "no rule for this operator")
        else:
            rule(trace, node)
    return trace
