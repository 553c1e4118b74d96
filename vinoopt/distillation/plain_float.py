"""The same quantized model with its quantizers spelled out in float operators.

OpenVINO runs FakeQuantize models with integer kernels, which round sums at other places than the graph says. What a
mirror has to equal is the graph itself; this form of it is computed in float, operator by operator.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def spelled_out(model: ov.Model, *, rounds: bool = True) -> ov.Model:
    """A copy of `model` in which each FakeQuantize is a clamp, a scale, a rounding and the way back.

    Without `rounds`, quantizers of activations only clamp: then no value lies near a threshold where the last bit of
    a sum decides, and two ways to compute the graph agree to float rounding.
    """
    copy: ov.Model = model.clone()
    computed: set[str] = set()
    for node in copy.get_ordered_ops():
        sources = {value.get_node().get_name() for value in node.input_values()}
        if node.get_type_name() == "Parameter" or sources & computed:
            computed.add(node.get_name())
        if node.get_type_name() != "FakeQuantize":
            continue
        steps = np.float32(node.get_attributes()["levels"] - 1)
        x, low, high, out_low, out_high = node.input_values()
        clamped = ops.minimum(ops.maximum(x, low), high)
        level = ops.multiply(ops.divide(ops.subtract(clamped, low), ops.subtract(high, low)), steps)
        if rounds or node.get_name() not in computed:
            level = ops.round(level, "half_to_even")
        value = ops.add(ops.multiply(ops.divide(level, steps), ops.subtract(out_high, out_low)), out_low)
        for reader in list(node.output(0).get_target_inputs()):
            reader.replace_source_output(value.output(0))
        if node.get_name() in computed:
            computed.add(value.get_name())
    copy.validate_nodes_and_infer_types()
    return copy
