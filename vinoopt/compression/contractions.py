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
    port = next((p for p in ports if _weight_constant(node.input_value(p)) is not None), None)
    if port is None:
        return None
    shape = tuple(node.input_value(port).get_shape())
    if kind == "MatMul":
        if len(shape) != 2:
            return None
        rows_first = _matmul_flags(node)[port] == (port == 0)
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


def _matmul_flags(node: ov.Node) -> tuple[bool, bool]:
    attributes = node.get_attributes()
    return bool(attributes["transpose_a"]), bool(attributes["transpose_b"])


def _weight_constant(source: ov.Output) -> ov.Node | None:
    """The floating-point constant behind a weight port, seen through operators that mix no columns."""
    node = source.get_node()
    while node.get_type_name() in _TRANSPARENT:
        node = node.input_value(0).get_node()
    is_float = node.get_type_name() == "Constant" and node.get_element_type().is_real()
    return node if is_float else None


# --------------------------------------------------------------------------- weights and bias


def weight_matrix(contraction: Contraction) -> NDArray[np.float64]:
    """The weights as [groups, columns, outputs], as stored: before any FakeQuantize."""
    source = contraction.node.input_value(contraction.weight_port)
    constant = _weight_constant(source)
    if constant is None:
        raise CompressionError(f'"{contraction.name}" has lost its constant weights')
    values = constant.get_data().astype(np.float64).reshape(tuple(source.get_shape()))
    grouped = values if contraction.type in _GROUPED else values[None]
    if contraction.type == "MatMul":
        rows_first = _matmul_flags(contraction.node)[contraction.weight_port] == (
            contraction.weight_port == 0
        )
        return np.ascontiguousarray(grouped if rows_first else grouped.transpose(0, 2, 1))
    grouped = np.moveaxis(grouped, 1 if contraction.type in _CONVOLUTIONS else 2, -1)
    return np.ascontiguousarray(grouped.reshape(contraction.groups, contraction.columns, contraction.outputs))


def replace_weights(contraction: Contraction, matrix: Array) -> None:
    """Put `matrix` ([groups, columns, outputs]) in place of the weights; a shared constant is left to the others."""
    port = contraction.node.input(contraction.weight_port)
    shape = tuple(port.get_shape())
    values = _from_matrix(contraction, matrix, shape)
    chain = [port]
    while chain[-1].get_source_output().get_node().get_type_name() in _TRANSPARENT:
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
        rows_first = _matmul_flags(contraction.node)[contraction.weight_port] == (
            contraction.weight_port == 0
        )
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
    constant = _weight_constant(add.input_value(port))
    if constant is None:
        raise CompressionError(f'"{contraction.name}" has lost its constant bias')
    values = constant.get_data().astype(np.float64).reshape(-1)
    bias: NDArray[np.float64] = np.broadcast_to(values, (contraction.groups * contraction.outputs,)).copy()
    return bias


def replace_bias(contraction: Contraction, bias: Array) -> None:
    """Put `bias` ([groups * outputs]) in place of the added constant; where there is none, add one."""
    output = contraction.node.output(0)
    shape = [1] * output.get_partial_shape().rank.get_length()
    shape[_channel_axis(contraction)] = -1
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
    if _weight_constant(add.input_value(port)) is None or _has_fake_quantize(add.input_value(port)):
        return None
    rank = contraction.node.get_output_partial_shape(0).rank.get_length()
    shape = tuple(add.input_value(port).get_shape())
    if len(shape) > rank:
        return None
    padded = (1,) * (rank - len(shape)) + shape
    axis = _channel_axis(contraction) % rank
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


def _channel_axis(contraction: Contraction) -> int:
    if contraction.type != "MatMul":
        return 1
    return -1 if contraction.weight_port == 1 else -2


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


# --------------------------------------------------------------------------- rows


class RowReader:
    """Reads sampled rows of a contraction's input and output tensors at the same output positions."""

    def __init__(self, contraction: Contraction) -> None:
        self._contraction = contraction
        self._tables: dict[tuple[int, ...], tuple[Indices, NDArray[np.bool_]]] = {}

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output tensor for an input tensor of `input_shape`."""
        contraction = self._contraction
        made = contraction.groups * contraction.outputs
        if contraction.type == "MatMul":
            shape = list(input_shape)
            del shape[self._data_axis(len(shape))]
            if contraction.weight_port == 1 or len(input_shape) == 1:
                return (*shape, made)
            return (*shape[:-1], made, shape[-1])
        size, attributes = tuple(input_shape)[2:], contraction.node.get_attributes()
        kernel = _kernel(contraction, len(size))
        reach = [
            (tap - 1) * dilation + 1 for tap, dilation in zip(kernel, attributes["dilations"], strict=True)
        ]
        paired = zip(size, attributes["strides"], reach, strict=True)
        if contraction.type in _TRANSPOSED:
            full = [(length - 1) * stride + span for length, stride, span in paired]
            extra = attributes["output_padding"]
            begins, ends = attributes["pads_begin"], attributes["pads_end"]
            places = [f - b - e + x for f, b, e, x in zip(full, begins, ends, extra, strict=True)]
        elif str(attributes["auto_pad"]).startswith("same"):
            places = [-(-length // stride) for length, stride, _ in paired]
        else:
            is_explicit = str(attributes["auto_pad"]) == "explicit"
            both = zip(attributes["pads_begin"], attributes["pads_end"], strict=True)
            pads = [begin + end if is_explicit else 0 for begin, end in both]
            places = [
                (length + pad - span) // stride + 1
                for (length, stride, span), pad in zip(paired, pads, strict=True)
            ]
        return (input_shape[0], made, *places)

    def _data_axis(self, rank: int) -> int:
        """Axis of a MatMul's data that is summed over."""
        port = self._contraction.data_port
        flag = _matmul_flags(self._contraction.node)[port]
        return rank - 1 if rank == 1 or flag == (port == 1) else rank - 2

    def positions(self, output_shape: Sequence[int], count: int, rng: np.random.Generator) -> Indices:
        """[samples, <= count] random output positions without repetition, the same number for every sample."""
        samples, places = self._layout(tuple(output_shape))
        if places <= count:
            return np.broadcast_to(np.arange(places), (samples, places))
        keys = rng.random((samples, places))
        return np.sort(np.argpartition(keys, count, axis=1)[:, :count], axis=1)

    def _layout(self, shape: tuple[int, ...]) -> tuple[int, int]:
        axis = _channel_axis(self._contraction) % len(shape)
        rest = [size for index, size in enumerate(shape) if index != axis]
        return (rest[0], math.prod(rest[1:])) if rest else (1, 1)

    def output_rows(self, tensor: Array, positions: Indices) -> Array:
        """[rows, groups * outputs] of an output tensor (or one of its shape)."""
        axis = _channel_axis(self._contraction) % tensor.ndim
        samples, places = self._layout(tensor.shape)
        spread = np.moveaxis(tensor, axis, -1).reshape(samples, places, tensor.shape[axis])
        return _take(spread, positions)

    def input_rows(self, tensor: Array, output_shape: Sequence[int], positions: Indices) -> Array:
        """[groups, rows, columns] of the input tensor: what the chosen output positions read."""
        if self._contraction.type == "MatMul":
            spread = np.moveaxis(tensor, self._data_axis(tensor.ndim), -1)
            samples, places = self._layout(tuple(output_shape))
            return _take(spread.reshape(samples, places, spread.shape[-1]), positions)[None]
        return self._patches(tensor, tuple(output_shape)[2:], positions)

    def _patches(self, tensor: Array, places: tuple[int, ...], positions: Indices) -> Array:
        samples, channels, *size = tensor.shape
        key = (*size, *places)
        if key not in self._tables:
            self._tables[key] = _source_table(self._contraction, tuple(size), places)
        table, inside = self._tables[key]
        flat = tensor.reshape(samples, channels, -1)
        count, taps = positions.shape[1], table.shape[1]
        rows = np.empty((samples, count, channels, taps), dtype=tensor.dtype)
        for sample, chosen in enumerate(positions):
            patch = flat[sample][:, table[chosen].ravel()].reshape(channels, count, taps)
            rows[sample] = patch.transpose(1, 0, 2) * inside[chosen][:, None, :]
        groups = self._contraction.groups
        grouped: Array = rows.reshape(samples * count, groups, -1).transpose(1, 0, 2)
        return grouped


def _take(spread: Array, positions: Indices) -> Array:
    taken: Array = np.take_along_axis(spread, positions[:, :, None], axis=1)
    return taken.reshape(-1, spread.shape[-1])


def _kernel(contraction: Contraction, rank: int) -> tuple[int, ...]:
    return tuple(contraction.node.input_value(contraction.weight_port).get_shape())[-rank:]


def _source_table(
    contraction: Contraction, size: tuple[int, ...], places: tuple[int, ...]
) -> tuple[Indices, NDArray[np.bool_]]:
    """For every output position and tap: the flat input position it reads, and whether that lies inside."""
    attributes = contraction.node.get_attributes()
    kernel = _kernel(contraction, len(size))
    begins = _pads_begin(contraction, attributes, (kernel, size, places))
    rank = len(size)
    flat = np.zeros((1,) * (2 * rank), dtype=np.intp)
    inside = np.ones((1,) * (2 * rank), dtype=np.bool_)
    for axis in range(rank):
        stride, dilation = attributes["strides"][axis], attributes["dilations"][axis]
        place = np.arange(places[axis])[:, None]
        tap = np.arange(kernel[axis])[None, :]
        if contraction.type in _TRANSPOSED:
            spread = place + begins[axis] - tap * dilation
            source, valid = spread // stride, spread % stride == 0
        else:
            source = place * stride - begins[axis] + tap * dilation
            valid = np.ones_like(source, dtype=np.bool_)
        valid &= (source >= 0) & (source < size[axis])
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = places[axis], kernel[axis]
        flat = flat * size[axis] + np.where(valid, source, 0).reshape(shape)
        inside = inside & valid.reshape(shape)
    taps = math.prod(kernel)
    return flat.reshape(-1, taps), inside.reshape(-1, taps)


def _pads_begin(
    contraction: Contraction,
    attributes: dict[str, object],
    extents: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> list[int]:
    """Padding before the first input of each axis, worked out from the shapes where the model leaves it open."""
    auto_pad = str(attributes["auto_pad"])
    if auto_pad == "explicit":
        return list(attributes["pads_begin"])  # type: ignore[call-overload, no-any-return]
    if contraction.type in _TRANSPOSED:
        raise CompressionError(
            f'"{contraction.name}" is a transposed convolution with auto_pad={auto_pad}; give it explicit padding'
        )
    if auto_pad == "valid":
        return [0] * len(extents[0])
    strides, dilations = attributes["strides"], attributes["dilations"]
    totals = [
        max((place - 1) * stride + (tap - 1) * dilation + 1 - size, 0)
        for tap, size, place, stride, dilation in zip(*extents, strides, dilations, strict=True)  # type: ignore[call-overload]
    ]
    return [total // 2 if auto_pad == "same_upper" else total - total // 2 for total in totals]
