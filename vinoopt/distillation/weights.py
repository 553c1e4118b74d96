"""Which constants of a model are weights, and how they go back into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from vinoopt.distillation.quantizers import Grid, fake_quantize, to_levels

Key: TypeAlias = "tuple[str, int]"
"""Name of a node, unique in its model, and its output."""

_READ_PORTS: dict[str, tuple[int, ...]] = {
    "Convolution": (1,),
    "GroupConvolution": (1,),
    "ConvolutionBackpropData": (1,),
    "GroupConvolutionBackpropData": (1,),
    "MatMul": (0, 1),
    "Gather": (0,),
    "LSTMCell": (3, 4, 5),
    "GRUCell": (2, 3, 4),
    "RNNCell": (2, 3, 4),
    "LSTMSequence": (4, 5, 6),
    "GRUSequence": (3, 4, 5),
    "RNNSequence": (3, 4, 5),
}
"""Contractions and embeddings: the inputs that hold weights."""
_ELEMENTWISE = frozenset({"Add", "Subtract", "Multiply", "Divide", "PRelu"})
_NORMALIZATION_PORTS: dict[str, tuple[int, ...]] = {"BatchNormInference": (1, 2), "GroupNormalization": (1, 2)}
_PASSING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "FakeQuantize"})
_FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
_BYTES = frozenset({"i8", "u8"})


def key_of(output: ov.Output) -> Key:
    """The key of an output."""
    return output.get_node().get_name(), output.get_index()


def as_tensor(node: ov.Node) -> Any:
    """A constant's value as a mirror keeps it: float32, int64 or bool."""
    kind = node.get_element_type()
    held = np.float32 if kind.is_real() else np.bool_ if kind.get_type_name() == "boolean" else np.int64
    # Asked for by type, since numpy has none for bf16 and 4 bits and would be handed their bytes.
    return torch.from_numpy(np.array(node.get_data(dtype=held)))


def replace_constant(old: ov.Node, values: np.ndarray[Any, Any]) -> ov.Node:
    """A constant of the same name and type with other values, in the place of `old`."""
    new = ops.constant(values, old.get_element_type())
    new.set_friendly_name(old.get_friendly_name())
    for reader in list(old.output(0).get_target_inputs()):
        reader.replace_source_output(new.output(0))
    return new


class Weight(Protocol):
    """A value that is trained, and its way back."""

    @property
    def key(self) -> Key:
        """The output that it stands for."""
        ...

    def parameters(self) -> tuple[Any, ...]:
        """The trained tensors: values first, then the logarithm of their scale's factor where they have one."""
        ...

    def value(self) -> Any:
        """What the output gives."""
        ...

    def write(self) -> None:
        """Put the present values into the model."""
        ...


class FloatWeight:
    """A float constant."""

    def __init__(self, node: ov.Node) -> None:
        self.node = node
        self.key = key_of(node.output(0))
        self.tensor = torch.nn.Parameter(as_tensor(node))

    def parameters(self) -> tuple[Any, ...]:
        """The constant itself."""
        return (self.tensor,)

    def value(self) -> Any:
        """The constant itself."""
        return self.tensor

    def write(self) -> None:
        """Replace the constant."""
        self.node = replace_constant(self.node, self.tensor.detach().cpu().numpy())


class IntegerWeight:
    """Weights stored in 8 bits: integer constant, Convert, Subtract (of a zero point), Multiply (by a scale)."""

    def __init__(self, parts: IntegerParts) -> None:
        self.parts = parts
        self.key = key_of(parts.multiply.output(0))
        stored, scale = as_tensor(parts.integers), as_tensor(parts.scale)
        zero = torch.zeros(()) if parts.zero is None else as_tensor(parts.zero).to(torch.float32)
        low, high = _limits(stored, is_signed=parts.integers.get_element_type().get_type_name() == "i8")
        self.least, self.scale = low, scale
        ends = [(end - zero) * scale for end in (low, high)]
        self.grid = Grid.of(*ends, *ends, levels=high - low + 1)
        self.tensor = torch.nn.Parameter((stored - zero) * scale)
        self.theta = torch.nn.Parameter(torch.zeros_like(scale))

    def parameters(self) -> tuple[Any, ...]:
        """Real values and the factor of their scales."""
        return self.tensor, self.theta

    def value(self) -> Any:
        """The values on the grid."""
        return fake_quantize(self.tensor, self.theta, self.grid)

    def write(self) -> None:
        """Replace the integers and their scales."""
        with torch.no_grad():
            levels = to_levels(self.tensor, self.theta, self.grid) + self.least
            scale = self.scale * torch.exp(self.theta.detach().cpu())
        self.parts = IntegerParts(
            integers=replace_constant(self.parts.integers, levels.cpu().numpy()),
            zero=self.parts.zero,
            scale=replace_constant(self.parts.scale, scale.numpy()),
            multiply=self.parts.multiply,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerParts:
    """The nodes of a weight in 8 bits."""

    integers: ov.Node
    zero: ov.Node | None
    scale: ov.Node
    multiply: ov.Node


def _limits(stored: Any, *, is_signed: bool) -> tuple[int, int]:
    """The range that these integers may use: symmetric where signed, and never more than was used before.

    NNCF leaves half of the range empty for CPUs whose sums saturate, and -128 for all.
    """
    low, high = int(stored.min()), int(stored.max())
    if not is_signed:
        return low, max(high, low + 1)
    most = max(-low, high, 1)
    return max(-most, -128), min(most, 127)


def find_weights(model: ov.Model) -> Iterator[FloatWeight | IntegerWeight]:
    """The weights of `model`, each once, in graph order."""
    behind: set[str] = set()
    seen: set[Key] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        inputs = node.input_values()
        if kind in _READ_PORTS or any(value.get_node().get_name() in behind for value in inputs):
            behind.add(node.get_name())
        for port in _ports(node, behind):
            weight = _weight_at(inputs[port])
            if weight is not None and weight.key not in seen:
                seen.add(weight.key)
                yield weight


def _ports(node: ov.Node, behind: set[str]) -> tuple[int, ...]:
    kind, inputs = node.get_type_name(), node.input_values()
    if kind in _READ_PORTS:
        return tuple(p for p in _READ_PORTS[kind] if p < len(inputs))
    if kind in _NORMALIZATION_PORTS:
        return _NORMALIZATION_PORTS[kind]
    if kind not in _ELEMENTWISE or len(inputs) != 2:
        return ()
    others = [inputs[1 - port].get_node().get_name() in behind for port in (0, 1)]
    return tuple(p for p in (0, 1) if others[p] and _is_channelwise(inputs[p]))


def _is_channelwise(output: ov.Output) -> bool:
    """Whether it is a constant with one value per index of one dimension: a bias or a scale, not a table.

    Single values are part of a formula, like the 3 and 6 of a hard swish.
    """
    shape = output.get_partial_shape()
    if not _is_constant(output) or shape.is_dynamic:
        return False
    return sum(int(d.get_length()) > 1 for d in shape) == 1


def _is_constant(output: ov.Output) -> bool:
    return bool(_unconverted(output.get_node()).get_type_name() == "Constant")


def _unconverted(node: ov.Node) -> ov.Node:
    """The node in front of changes of type."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node


def _is_real(node: ov.Node) -> bool:
    return bool(node.get_element_type().is_real())


def _weight_at(output: ov.Output) -> FloatWeight | IntegerWeight | None:
    """The weight that `output` gives, seen through operators that only reshape or quantize it."""
    node = output.get_node()
    while True:
        kind = node.get_type_name()
        if kind == "Constant":
            is_weight = node.get_element_type().get_type_name() in _FLOATS
            return FloatWeight(node) if is_weight and len(node.get_output_shape(0)) > 0 else None
        if kind == "Multiply":
            parts = _integer_parts(node)
            return None if parts is None else IntegerWeight(parts)
        if kind not in _PASSING:
            return None
        node = node.input_value(0).get_node()


def _integer_parts(multiply: ov.Node) -> IntegerParts | None:
    inner, scale = (value.get_node() for value in multiply.input_values())
    if _unconverted(inner).get_type_name() == "Constant" and _is_real(_unconverted(inner)):
        inner, scale = scale, inner
    scale, zero = _unconverted(scale), None
    if inner.get_type_name() == "Subtract":
        inner, zero = (value.get_node() for value in inner.input_values())
        zero = _unconverted(zero)
    if inner.get_type_name() != "Convert":
        return None
    integers = inner.input_value(0).get_node()
    nodes = [integers, scale, *([] if zero is None else [zero])]
    if any(each.get_type_name() != "Constant" for each in nodes) or not _is_real(scale):
        return None
    if integers.get_element_type().get_type_name() not in _BYTES:
        return None
    return IntegerParts(integers=integers, zero=zero, scale=scale, multiply=multiply)
