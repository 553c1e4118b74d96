"""Contractions as matrices: which columns an operator reads, which weights it holds, and how both are exchanged.

A contraction is a Convolution, its grouped or transposed kin, or a MatMul, whose weights are constant. Each of
its outputs is `rows @ matrix + bias`: a row holds what one output position reads (im2col for convolutions,
column = channel * taps + tap), `matrix` has shape [groups, columns, outputs].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from vinoopt.errors import CompressionError, PlanError
from vinoopt.serde import nearest

Array: TypeAlias = NDArray[np.floating]
Indices: TypeAlias = NDArray[np.intp]

_CONVOLUTIONS = ("Convolution", "GroupConvolution")
_TRANSPOSED = ("ConvolutionBackpropData", "GroupConvolutionBackpropData")
_GROUPED = ("GroupConvolution", "GroupConvolutionBackpropData")
_TYPES = (*_CONVOLUTIONS, *_TRANSPOSED, "MatMul")

_TRANSPARENT = ("Convert", "Reshape", "FakeQuantize")
"""What may lie between a weight constant and its contraction without mixing columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contraction:
    """A contraction of one model, with the ports that hold its data and its weights."""

    node: ov.Node
    name: str
    type: str
    data_port: int
    weight_port: int
    groups: int
    columns: int
    """Input columns of each group."""
    outputs: int
    """Output channels of each group."""
    taps: int
    """Columns that one input channel has: the size of the kernel."""

    @property
    def data(self) -> ov.Output:
        """The tensor that it reads."""
        return self.node.input_value(self.data_port)

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.type in _TRANSPOSED

    @property
    def channel_axis(self) -> int:
        """Axis of its output that the channels lie on."""
        if self.type != "MatMul":
            return 1
        return -1 if self.weight_port == 1 else -2

    def is_flipped(self, port: int) -> bool:
        """Whether a MatMul transposes the operand at `port`."""
        return bool(self.node.get_attributes()["transpose_b" if port else "transpose_a"])

    @property
    def is_depthwise(self) -> bool:
        """Whether every group reads one channel: nothing can be removed from it but whole groups."""
        return self.groups > 1 and self.columns == self.taps


def index_contractions(model: ov.Model) -> dict[str, Contraction]:
    """Friendly name -> contraction with constant weights, in topological order."""
    found = (_contraction(node) for node in model.get_ordered_ops() if node.get_type_name() in _TYPES)
    return {each.name: each for each in found if each is not None}


def select_contractions(model: ov.Model, names: Sequence[str]) -> list[Contraction]:
    """The named contractions in topological order; `PlanError` for a name that is none."""
    known = index_contractions(model)
    for name in names:
        if name not in known:
            raise PlanError(
                f'"{name}" is not a contraction with constant weights{nearest(name, list(known))}; '
                "only Convolution, its kin and MatMul with a constant can be addressed"
            )
    wanted = set(names)
    return [each for name, each in known.items() if name in wanted]


def _contraction(node: ov.Node) -> Contraction | None:
    kind = node.get_type_name()
    ports = (1, 0) if kind == "MatMul" else (1,)
    port = next((p for p in ports if _is_constant(node.input_value(p))), None)
    if port is None:
        return None
    shape = tuple(node.input_value(port).get_shape())
    if kind == "MatMul":
        if len(shape) != 2:
            return None
        flag = node.get_attributes()["transpose_b" if port else "transpose_a"]
        rows_first = bool(flag) == (port == 0)
        columns, outputs = shape if rows_first else shape[::-1]
        groups, taps = 1, 1
    else:
        groups, (first, second, *kernel) = (shape[0], shape[1:]) if kind in _GROUPED else (1, shape)
        channels, outputs = (first, second) if kind in _TRANSPOSED else (second, first)
        taps = math.prod(kernel)
        columns = channels * taps
    return Contraction(
        node=node,
        name=node.get_friendly_name(),
        type=kind,
        data_port=1 - port,
        weight_port=port,
        groups=groups,
        columns=columns,
        outputs=outputs,
        taps=taps,
    )


def _is_constant(source: ov.Output) -> bool:
    """Whether a tensor depends on constants alone."""
    stack = [source.get_node()]
    while stack:
        node = stack.pop()
        if node.get_type_name() == "Constant":
            continue
        if not node.get_input_size():
            return False
        stack += [value.get_node() for value in node.input_values()]
    return True


def _float_constant(source: ov.Output) -> ov.Node | None:
    """The floating-point constant behind a tensor, seen through operators that mix no columns."""
    node = source.get_node()
    while node.get_type_name() in _TRANSPARENT:
        node = node.input_value(0).get_node()
    is_float = node.get_type_name() == "Constant" and node.get_element_type().is_real()
    return node if is_float else None


def _evaluated(source: ov.Output) -> NDArray[np.float64]:
    """The value of a tensor that depends on constants alone, as weights stored in INT8 with their scales."""
    model = ov.Model([opset.result(source)], []).clone()
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values: NDArray[np.float64] = compiled([])[0].astype(np.float64)
    return values


# --------------------------------------------------------------------------- weights and bias


def weight_matrix(contraction: Contraction) -> NDArray[np.float64]:
    """The weights as [groups, columns, outputs]; floats as stored, before any FakeQuantize, else their value."""
    source = contraction.node.input_value(contraction.weight_port)
    constant = _float_constant(source)
    values = _evaluated(source) if constant is None else constant.get_data().astype(np.float64)
    values = values.reshape(tuple(source.get_shape()))
    grouped = values if contraction.type in _GROUPED else values[None]
    if contraction.type == "MatMul":
        rows_first = contraction.is_flipped(contraction.weight_port) == (contraction.weight_port == 0)
        return np.ascontiguousarray(grouped if rows_first else grouped.transpose(0, 2, 1))
    grouped = np.moveaxis(grouped, 1 if contraction.type in _CONVOLUTIONS else 2, -1)
    return np.ascontiguousarray(grouped.reshape(contraction.groups, contraction.columns, contraction.outputs))


def replace_weights(contraction: Contraction, matrix: Array) -> None:
    """Put `matrix` ([groups, columns, outputs]) in place of the weights; a shared constant is left to the others.

    Weights stored as integers with scales give way to a floating-point constant.
    """
    port = contraction.node.input(contraction.weight_port)
    shape = tuple(port.get_shape())
    values = _from_matrix(contraction, matrix, shape)
    chain = [port]
    is_float = _float_constant(port.get_source_output()) is not None
    while is_float and chain[-1].get_source_output().get_node().get_type_name() in _TRANSPARENT:
        chain.append(chain[-1].get_source_output().get_node().input(0))
    links = [link.get_source_output().get_node() for link in chain[:-1]]
    if any(len(node.output(0).get_target_inputs()) > 1 for node in links):
        if any(node.get_type_name() == "FakeQuantize" for node in links):
            raise CompressionError(
                f'the FakeQuantize on the weights of "{contraction.name}" serves other layers too; '
                "refit before quantization"
            )
        chain = chain[:1]
    old = chain[-1].get_source_output()
    new = _constant(values.reshape(tuple(old.get_shape())), old.get_element_type())
    new.set_friendly_name(old.get_node().get_friendly_name())
    chain[-1].replace_source_output(new.output(0))


def _from_matrix(contraction: Contraction, matrix: Array, shape: tuple[int, ...]) -> Array:
    if matrix.shape != (contraction.groups, contraction.columns, contraction.outputs):
        raise CompressionError(
            f'weights of shape {matrix.shape} do not fit "{contraction.name}", which has '
            f"{contraction.groups} groups of {contraction.columns} columns and {contraction.outputs} outputs"
        )
    if contraction.type == "MatMul":
        rows_first = contraction.is_flipped(contraction.weight_port) == (contraction.weight_port == 0)
        plain: Array = matrix[0] if rows_first else matrix[0].T
        return plain
    grouped_shape = shape if contraction.type in _GROUPED else (1, *shape)
    channels_first = contraction.type in _CONVOLUTIONS
    channels = grouped_shape[2] if channels_first else grouped_shape[1]
    spread = matrix.reshape(contraction.groups, channels, *grouped_shape[3:], contraction.outputs)
    values: Array = np.moveaxis(spread, -1, 1 if channels_first else 2).reshape(shape)
    return values


def _constant(values: Array, element_type: ov.Type) -> ov.Node:
    return opset.constant(np.ascontiguousarray(values).astype(element_type.to_dtype()))


def bias_vector(contraction: Contraction) -> NDArray[np.float64] | None:
    """The bias as [groups * outputs] where a constant is added right behind, else None."""
    found = _bias_add(contraction)
    if found is None:
        return None
    add, port = found
    constant = _float_constant(add.input_value(port))
    if constant is None:
        raise CompressionError(f'"{contraction.name}" has lost its constant bias')
    values = constant.get_data().astype(np.float64).reshape(-1)
    bias: NDArray[np.float64] = np.broadcast_to(values, (contraction.groups * contraction.outputs,)).copy()
    return bias


def replace_bias(contraction: Contraction, bias: Array) -> None:
    """Put `bias` ([groups * outputs]) in place of the added constant; where there is none, add one."""
    output = contraction.node.output(0)
    shape = [1] * output.get_partial_shape().rank.get_length()
    shape[contraction.channel_axis] = -1
    constant = _constant(bias.reshape(shape), output.get_element_type())
    found = _bias_add(contraction)
    if found is not None:
        add, port = found
        constant.set_friendly_name(add.input_value(port).get_node().get_friendly_name())
        add.input(port).replace_source_output(constant.output(0))
        return
    readers = output.get_target_inputs()
    add = opset.add(output, constant)
    add.set_friendly_name(f"{contraction.name}/bias")
    for reader in readers:
        reader.replace_source_output(add.output(0))
    names = output.get_names()
    output.set_names(set())
    add.output(0).set_names(names)


def _bias_add(contraction: Contraction) -> tuple[ov.Node, int] | None:
    add = _only_reader(contraction.node.output(0), "Add")
    if add is None:
        return None
    port = 1 if add.input_value(0).get_node() == contraction.node else 0
    if _float_constant(add.input_value(port)) is None or _has_fake_quantize(add.input_value(port)):
        return None
    rank = contraction.node.get_output_partial_shape(0).rank.get_length()
    shape = tuple(add.input_value(port).get_shape())
    if len(shape) > rank:
        return None
    padded = (1,) * (rank - len(shape)) + shape
    axis = contraction.channel_axis % rank
    others = [size for index, size in enumerate(padded) if index != axis]
    fits = padded[axis] in (1, contraction.groups * contraction.outputs)
    return (add, port) if fits and all(size == 1 for size in others) else None


def _has_fake_quantize(source: ov.Output) -> bool:
    node = source.get_node()
    while node.get_type_name() in _TRANSPARENT:
        if node.get_type_name() == "FakeQuantize":
            return True
        node = node.input_value(0).get_node()
    return False


def _only_reader(output: ov.Output, kind: str) -> ov.Node | None:
    readers = [target.get_node() for target in output.get_target_inputs()]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == kind else None


def biased_output(contraction: Contraction) -> ov.Output:
    """The tensor behind the bias, or the contraction's own output where it has none."""
    found = _bias_add(contraction)
    return contraction.node.output(0) if found is None else found[0].output(0)


def residual_join(contraction: Contraction) -> tuple[ov.Output, ov.Output] | None:
    """(sum, other branch) where the contraction's biased output feeds nothing but an Add with another tensor.

    FakeQuantize operators between the two are looked through.
    """
    output = biased_output(contraction)
    while (quantizer := _only_reader(output, "FakeQuantize")) is not None:
        output = quantizer.output(0)
    add = _only_reader(output, "Add")
    if add is None:
        return None
    port = 1 if add.input_value(0) == output else 0
    other = add.input_value(port)
    if other == output or other.get_node().get_type_name() == "Constant":
        return None
    same = other.get_partial_shape() == output.get_partial_shape() == add.get_output_partial_shape(0)
    return (add.output(0), other) if same else None
