"""What the constant inputs and the static shapes of an operator say."""

from __future__ import annotations

import numpy as np
import openvino as ov


def constant_value(output: ov.Output) -> np.ndarray | None:
    """The value of a constant, seen through conversions; None where it is computed."""
    node = output.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.get_data())


def integers(node: ov.Node, port: int) -> list[int] | None:
    """A constant input as a flat list of whole numbers; None where it is computed or absent."""
    if port >= node.get_input_size():
        return None
    value = constant_value(node.input_value(port))
    return None if value is None else [int(each) for each in value.ravel()]


def out_shape(node: ov.Node, port: int = 0) -> list[int | None] | None:
    """The shape of an output, None for each size (or the rank) that is not known."""
    shape = node.get_output_partial_shape(port)
    if shape.rank.is_dynamic:
        return None
    return [d.get_length() if d.is_static else None for d in shape]
