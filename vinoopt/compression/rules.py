"""Operator rules of the coupling: layers with weights, elementwise operators, pooling, norms.

A rule reads the labels of its inputs, emits links and freezes, and sets the labels of its outputs. `RULES` is
complete: an operator that is not in it freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import openvino as ov

from vinoopt.compression.coupling import Contraction, Dims, Labels, Site, Trace
from vinoopt.compression.shape_rules import SHAPE_RULES, constant_value

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


def known(dims: Sequence[Dims]) -> list[tuple[Labels | None, ...]] | None:
    """The same list where every rank is known, else None."""
    found = [each for each in dims if each is not None]
    return found if len(found) == len(dims) else None


def _inputs(trace: Trace, node: ov.Node, count: int | None = None) -> list[tuple[Labels | None, ...]] | None:
    return known([trace.dims(node, port) for port in range(count or node.get_input_size())])


def parameter(trace: Trace, node: ov.Node) -> None:
    """Inputs keep their shape."""
    trace.put(node, trace.fixed_dims(node.output(0), f"model input '{node.get_friendly_name()}'"))


def constant(trace: Trace, node: ov.Node) -> None:
    """Every index of a constant is a free atom."""
    where = f"'{node.get_friendly_name()}' is too long to be channels"
    trace.put(node, tuple(trace.atoms(size, where) for size in node.get_output_shape(0)))


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
    inputs = _inputs(trace, node)
    if inputs is None or node.get_attributes().get("auto_broadcast", "numpy") == "pdpd":
        trace.freeze_node(node, "broadcasting that is not numpy's, or unknown rank")
        return
    trace.put(node, broadcast(trace, inputs, node))


def broadcast(trace: Trace, inputs: Iterable[tuple[Labels | None, ...]], node: ov.Node) -> Dims:
    """Labels of the numpy broadcast of the inputs; broadcast dimensions of size 1 stay."""
    reason = f"'{node.get_friendly_name()}' broadcasts it"
    found: tuple[Labels | None, ...] = ()
    for dims in inputs:
        longer, shorter = (found, dims) if len(found) >= len(dims) else (dims, found)
        lead = len(longer) - len(shorter)
        joined = [_broadcast_dim(trace, *pair, reason) for pair in zip(longer[lead:], shorter, strict=True)]
        found = (*longer[:lead], *joined)
    return found


def _broadcast_dim(trace: Trace, one: Labels | None, other: Labels | None, reason: str) -> Labels | None:
    if one is None or other is None:
        trace.link(one, other, reason)
        sized = one if one is not None else other
        return None if sized is None or sized.size == 1 else trace.fixed(sized.size, reason)
    if one.size == other.size:
        trace.link(one, other, reason)
        return one if (one >= 0).any() else other
    small, large = (one, other) if one.size == 1 else (other, one)
    trace.freeze(small, reason)
    return large


def prelu(trace: Trace, node: ov.Node) -> None:
    """The slope lies on axis 1 where it is one value per channel, else broadcasts."""
    inputs = _inputs(trace, node)
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
    trace.put(node, broadcast(trace, (data, slope), node))


# --------------------------------------------------------------------------- layers with weights


def convolution(trace: Trace, node: ov.Node) -> None:
    """It reads input channels and makes output channels."""
    _convolution(trace, node, out_axis=0, in_axis=1)


def convolution_backprop(trace: Trace, node: ov.Node) -> None:
    """A transposed convolution; its weight lies with the input channels first."""
    _convolution(trace, node, out_axis=1, in_axis=0)


def _convolution(trace: Trace, node: ov.Node, *, out_axis: int, in_axis: int) -> None:
    inputs = _inputs(trace, node, 2)
    if inputs is None or not trace.is_constant(node, 1):
        trace.freeze_node(node, "its weight is not constant")
        return
    data, weight = inputs
    name = node.get_friendly_name()
    for labels in (*data[2:], *weight[2:]):
        trace.freeze(labels, f"window of '{name}'")
    rows, columns = weight[out_axis], weight[in_axis]
    if rows is None or columns is None or data[1] is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    trace.link(data[1], columns, f"channels of '{name}'")
    trace.contractions.append(
        Contraction(
            name=name,
            node=node.get_name(),
            columns=columns,
            rows=rows,
            data_port=0,
            column_axis=1,
            row_axis=1,
        )
    )
    trace.put(node, (data[0], rows, *_window(trace, node)))


def _window(trace: Trace, node: ov.Node) -> tuple[Labels | None, ...]:
    fixed = trace.fixed_dims(node.output(0), f"window of '{node.get_friendly_name()}'")
    return fixed[2:] if fixed is not None else ()


def group_convolution(trace: Trace, node: ov.Node) -> None:
    """Groups times positions; one channel a group (depthwise) just passes labels on."""
    _group_convolution(trace, node, out_axis=1, in_axis=2)


def group_convolution_backprop(trace: Trace, node: ov.Node) -> None:
    """The same, with input positions before output positions."""
    _group_convolution(trace, node, out_axis=2, in_axis=1)


def _group_convolution(trace: Trace, node: ov.Node, *, out_axis: int, in_axis: int) -> None:
    inputs = _inputs(trace, node, 2)
    if inputs is None or not trace.is_constant(node, 1):
        trace.freeze_node(node, "its weight is not constant")
        return
    data, weight = inputs
    name = node.get_friendly_name()
    for labels in (*data[2:], *weight[3:]):
        trace.freeze(labels, f"window of '{name}'")
    groups, inner, outer = weight[0], weight[in_axis], weight[out_axis]
    if data[1] is None or groups is None or inner is None or outer is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    reads = inner.size > 1
    _factor(trace, node, "columns", data[1], (groups, inner))
    rows = groups
    if outer.size > 1:
        rows = trace.atoms(groups.size * outer.size, f"output of '{name}'")
        _factor(trace, node, "rows", rows, (groups, outer))
    else:
        trace.freeze(outer, f"'{name}' has one output a group")
    trace.contractions.append(
        Contraction(
            name=name,
            node=node.get_name(),
            columns=data[1] if reads else np.empty(0, np.int64),
            rows=rows,
            data_port=0,
            column_axis=1,
            row_axis=1,
            site=(node.get_name(), "columns"),
        )
    )
    trace.put(node, (data[0], rows, *_window(trace, node)))


def _factor(trace: Trace, node: ov.Node, place: str, flat: Labels, factors: tuple[Labels, Labels]) -> None:
    """The channels of a grouped convolution are groups times positions; whole groups are preferred."""
    name = node.get_friendly_name()
    if factors[1].size == 1:
        trace.freeze(factors[1], f"'{name}' has one channel a group")
        trace.link(flat, factors[0], f"groups of '{name}'")
        return
    site = Site(key=(node.get_name(), place), layer=name, flat=flat, factors=factors, preferred=0)
    trace.sites.append(site)


def matmul(trace: Trace, node: ov.Node) -> None:
    """With one constant side it is a layer; two activations link batch dimensions and keep what they sum over."""
    inputs = _inputs(trace, node)
    attributes = node.get_attributes()
    name = node.get_friendly_name()
    if inputs is None or min(len(dims) for dims in inputs) < 2:
        trace.freeze_node(node, "a product with a vector")
        return
    left, right = list(inputs[0]), list(inputs[1])
    left_sum, right_sum = (-2, -1) if attributes["transpose_a"] else (-1, -2)
    if attributes["transpose_a"]:
        left[-2:] = left[-1], left[-2]
    right_axes = (-1, -2) if attributes["transpose_b"] else (-2, -1)
    right[-2:] = right[right_axes[0]], right[right_axes[1]]
    right_sum = right_axes[0]
    batch = broadcast(trace, (tuple(left[:-2]), tuple(right[:-2])), node) or ()
    trace.link(left[-1], right[-2], f"sum of '{name}'")
    constant_ports = [port for port in (0, 1) if trace.is_constant(node, port)]
    if len(constant_ports) != 1 or left[-1] is None or right[-2] is None:
        why = f"'{name}' multiplies two activations over it"
        trace.freeze(left[-1], why)
        trace.freeze(right[-2], why)
    else:
        _matmul_contraction(trace, node, constant_ports[0], (left, right), (left_sum, right_sum))
    trace.put(node, (*batch, left[-2], right[-1]))


def _matmul_contraction(
    trace: Trace,
    node: ov.Node,
    weight_port: int,
    sides: tuple[Sequence[Labels | None], Sequence[Labels | None]],
    sums: tuple[int, int],
) -> None:
    columns, rows = (sides[0][-1], sides[0][-2]) if weight_port == 0 else (sides[1][-2], sides[1][-1])
    if columns is None or rows is None:
        return
    data_port = 1 - weight_port
    trace.contractions.append(
        Contraction(
            name=node.get_friendly_name(),
            node=node.get_name(),
            columns=columns,
            rows=rows,
            data_port=data_port,
            column_axis=sums[data_port],
            row_axis=-2 if weight_port == 0 else -1,
        )
    )


def attention(trace: Trace, node: ov.Node) -> None:
    """Value features and heads pass; the default scale depends on the number of query features."""
    inputs = _inputs(trace, node)
    if inputs is None or any(len(dims) < 2 for dims in inputs[:3]) or node.get_input_size() > 5:
        trace.freeze_node(node, "unknown rank")
        return
    name = node.get_friendly_name()
    query, key, value = inputs[:3]
    trace.link(query[-1], key[-1], f"scores of '{name}'")
    trace.freeze(query[-1], f"'{name}' multiplies two activations over it")
    trace.freeze(key[-1], f"'{name}' multiplies two activations over it")
    for labels in (query[-2], key[-2], value[-2]):
        trace.freeze(labels, f"softmax of '{name}'")
    batch = broadcast(trace, [dims[:-2] for dims in inputs[:3]], node) or ()
    for extra in inputs[3:]:
        if len(extra) >= 2:
            broadcast(trace, [batch, extra[:-2]], node)
            trace.freeze(extra[-1], f"mask of '{name}'")
            trace.freeze(extra[-2], f"mask of '{name}'")
        else:
            for labels in extra:
                trace.freeze(labels, f"scale or mask of '{name}'")
    trace.put(node, (*batch, query[-2], value[-1]))


# --------------------------------------------------------------------------- pooling, reductions, norms


def pool(trace: Trace, node: ov.Node) -> None:
    """Channels pass, windows stay."""
    dims = trace.dims(node, 0)
    if dims is None:
        trace.freeze_node(node, "unknown rank")
        return
    for labels in dims[2:]:
        trace.freeze(labels, f"window of '{node.get_friendly_name()}'")
    out = (*dims[:2], *_window(trace, node))
    if node.get_output_size() > 1 and node.output(1).get_target_inputs():
        trace.freeze_node(node, "the positions it found are used")
        return
    trace.put(node, *(out for _ in node.outputs()))


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


def batch_norm(trace: Trace, node: ov.Node) -> None:
    """Its statistics go with the channels."""
    inputs = _inputs(trace, node)
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
    "Constant": constant,
    "Convolution": convolution,
    "ConvolutionBackpropData": convolution_backprop,
    "GroupConvolution": group_convolution,
    "GroupConvolutionBackpropData": group_convolution_backprop,
    "MatMul": matmul,
    "PRelu": prelu,
    "Parameter": parameter,
    "Result": result,
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
