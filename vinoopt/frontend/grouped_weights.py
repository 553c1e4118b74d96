"""Quantized weights of grouped convolutions, in the shape in which OpenVINO's own convolutions hold them.

ONNX keeps the groups of such weights in their output channels, OpenVINO in an axis of their own, so its reader
puts a Reshape between dequantization and convolution. The GPU plugin of OpenVINO 2026.4 stumbles over that: for
GPUs without INT8 it refuses models of about ten and more convolutions ("Weights/ifm mismatch"), on those with
INT8 it leaves these layers in float, on reference kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import openvino as ov
from openvino import opset13 as ops

_GROUPED = frozenset({"GroupConvolution", "GroupConvolutionBackpropData"})
_WEIGHTS = 1
_ARITHMETIC: dict[str, Callable[..., ov.Node]] = {"Subtract": ops.subtract, "Multiply": ops.multiply}
"""Of DequantizeLinear, besides Convert."""


def split_groups(model: ov.Model) -> int:
    """Give the constants behind dequantized weights the shape that a Reshape gave their product, in place.

    Returns how many weights were changed. The same numbers are computed in the same order, so results are equal.
    """
    changed = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() not in _GROUPED:
            continue
        reshape = node.input_value(_WEIGHTS).get_node()
        groups = _split_by(reshape)
        if groups is None or not _is_constant(reshape.input_value(0).get_node()):
            continue
        product = reshape.input_value(0).get_node()
        split = _split(product, rank=len(product.get_output_shape(0)), groups=groups)
        node.input(_WEIGHTS).replace_source_output(split.output(0))
        changed += 1
    if changed:
        model.validate_nodes_and_infer_types()
    return changed


def _split_by(node: ov.Node) -> int | None:
    """Into how many groups a Reshape divides the first axis, where it does nothing else."""
    if node.get_type_name() != "Reshape" or node.get_output_partial_shape(0).is_dynamic:
        return None
    if node.input_value(0).get_partial_shape().is_dynamic:
        return None
    before, after = list(node.input_value(0).get_shape()), list(node.get_output_shape(0))
    if not before or len(after) != len(before) + 1 or after[2:] != before[1:] or after[0] * after[1] != before[0]:
        return None
    return int(after[0])


def _is_constant(node: ov.Node) -> bool:
    """Whether a value comes from constants by conversions and arithmetic alone."""
    kind = node.get_type_name()
    return kind == "Constant" or (
        (kind == "Convert" or kind in _ARITHMETIC)
        and all(_is_constant(value.get_node()) for value in node.input_values())
    )


def _split(node: ov.Node, *, rank: int, groups: int) -> ov.Node:
    """`node` computed with the first of `rank` axes divided into groups; axes that it lacks have length one."""
    kind = node.get_type_name()
    inputs = [value.get_node() for value in node.input_values()]
    if kind == "Constant":
        missing: list[int] = [1] * (rank - len(node.get_output_shape(0)))
        shape = missing + [int(length) for length in node.get_output_shape(0)]
        shape[:1] = [groups, shape[0] // groups] if shape[0] > 1 else [1, 1]
        # The same bytes: numpy knows no shape of numbers that have less than one.
        tensor = ov.Tensor(node.get_data(), ov.Shape(shape), node.get_element_type())
        made = ops.constant(tensor, shared_memory=False)
    elif kind == "Convert":
        made = ops.convert(_split(inputs[0], rank=rank, groups=groups), node.get_element_type().to_string())
    else:
        made = _ARITHMETIC[kind](*(_split(each, rank=rank, groups=groups) for each in inputs))
    made.set_friendly_name(node.get_friendly_name())
    return made
