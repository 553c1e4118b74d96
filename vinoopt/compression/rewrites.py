"""What operators hold as constants (target shapes, lengths, starts, indices), rewritten for the indices that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as opset
from numpy.typing import NDArray

from vinoopt.compression.constants import integers

Mask = NDArray[np.bool_]
MaskDims = tuple[Mask | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """An operator of the smaller model, with the indices that stay in its tensors as they were."""

    node: ov.Node
    inputs: tuple[MaskDims, ...]
    """Per input and dimension the indices that stay; None where all do. An empty tuple: nothing is cut."""
    outputs: tuple[MaskDims, ...]
    in_shape: tuple[int | None, ...]
    """Shape of the first input before."""

    def input_mask(self, axis: int, port: int = 0) -> Mask | None:
        """What stays of a dimension of an input."""
        return self.inputs[port][axis] if self.inputs[port] else None

    def output_mask(self, axis: int, port: int = 0) -> Mask | None:
        """What stays of a dimension of an output."""
        return self.outputs[port][axis] if self.outputs[port] else None


Rewrite = Callable[[Cut], bool]
"""Whether the operator is still in its place; another may stand there instead."""


def set_integers(node: ov.Node, port: int, values: list[int]) -> None:
    """Give a node its own constant of whole numbers, of the type and rank that it had."""
    old = node.input_value(port)
    is_scalar = old.get_partial_shape().rank.is_static and len(old.get_partial_shape()) == 0
    array = np.asarray(values, np.int64)
    made = opset.constant(array.reshape(()) if is_scalar else array, dtype=old.get_element_type())
    made.set_friendly_name(f"{node.get_friendly_name()}/{port}")
    node.input(port).replace_source_output(made.output(0))


def patch_integers(node: ov.Node, port: int, values: dict[int, int]) -> None:
    """Overwrite entries of a shape, whether it is a constant or computed."""
    known = integers(node, port)
    if known is not None:
        set_integers(node, port, [values.get(index, value) for index, value in enumerate(known)])
        return
    old = node.input_value(port)
    patched = opset.scatter_update(
        old,
        opset.constant(np.asarray(list(values), np.int64)),
        opset.constant(np.asarray(list(values.values()), np.int64), dtype=old.get_element_type()),
        opset.constant(np.int64(0)),
    )
    node.input(port).replace_source_output(patched.output(0))


def replace_node(old: ov.Node, new: ov.Node) -> None:
    """Put `new` in the place of `old`, with its names."""
    new.set_friendly_name(old.get_friendly_name())
    for before, after in zip(old.outputs(), new.outputs(), strict=True):
        _redirect(before, after)


def _redirect(before: ov.Output, after: ov.Output) -> None:
    names = before.get_names()
    for target in before.get_target_inputs():
        target.replace_source_output(after)
    if names:
        after.set_names(names)


def _sizes(cut: Cut) -> dict[int, int]:
    """New sizes of the output's dimensions that are cut."""
    return {axis: int(mask.sum()) for axis, mask in enumerate(cut.outputs[0]) if mask is not None}


def _reshape(cut: Cut) -> bool:
    pattern = integers(cut.node, 1)
    sizes = _sizes(cut)
    if pattern is not None:
        # -1 takes what is left, whatever that is now: a pattern that serves any batch goes on doing so.
        sizes = {axis: size for axis, size in sizes.items() if pattern[axis] != -1}
    if sizes:
        patch_integers(cut.node, 1, sizes)
    return True


def _target_shape(cut: Cut) -> bool:
    sizes = _sizes(cut)
    if sizes:
        patch_integers(cut.node, 1, sizes)
    return True


def _split(cut: Cut) -> bool:
    axes = integers(cut.node, 1) or [0]
    axis = axes[0] % max(len(cut.in_shape), 1)
    if cut.input_mask(axis) is None:
        return True
    lengths = []
    for port in range(cut.node.get_output_size()):
        mask = cut.output_mask(axis, port)
        shape = cut.node.get_output_partial_shape(port)
        lengths.append(shape[axis].get_length() if mask is None else int(mask.sum()))
    if cut.node.get_type_name() == "VariadicSplit" and all(lengths):
        set_integers(cut.node, 2, lengths)
        return True
    _replace_split(cut.node, lengths)
    return False


def _replace_split(node: ov.Node, lengths: list[int]) -> None:
    """A `VariadicSplit` in the place of a split; parts of length 0 have no readers and are left out."""
    left = [port for port, length in enumerate(lengths) if length]
    parts = opset.variadic_split(
        node.input_value(0),
        node.input_value(1),
        opset.constant(np.asarray([lengths[port] for port in left], np.int64)),
    )
    parts.set_friendly_name(node.get_friendly_name())
    for made, port in enumerate(left):
        _redirect(node.output(port), parts.output(made))


def _slice(cut: Cut) -> bool:
    starts, stops = integers(cut.node, 1), integers(cut.node, 2)
    if starts is None or stops is None:
        return True
    axes = integers(cut.node, 4) if cut.node.get_input_size() > 4 else list(range(len(starts)))
    for position, axis in enumerate(axes or []):
        mask = cut.input_mask(axis % len(cut.in_shape))
        if mask is not None:
            starts[position], stops[position] = _moved(starts[position], stops[position], mask)
    set_integers(cut.node, 1, starts)
    set_integers(cut.node, 2, stops)
    return True


def _moved(start: int, stop: int, mask: Mask) -> tuple[int, int]:
    """Bounds of a slice with step 1, counted in the indices that stay."""
    first, last, _ = slice(start, stop, 1).indices(mask.size)
    return int(mask[:first].sum()), int(mask[: max(first, last)].sum())


def _strided_slice(cut: Cut) -> bool:
    starts, stops = integers(cut.node, 1), integers(cut.node, 2)
    if starts is None or stops is None:
        return True
    for axis in range(len(starts)):
        mask = cut.input_mask(axis)
        if mask is not None:
            starts[axis], stops[axis] = _moved(starts[axis], stops[axis], mask)
    set_integers(cut.node, 1, starts)
    set_integers(cut.node, 2, stops)
    return True


def _gather(cut: Cut) -> bool:
    axis = (integers(cut.node, 2) or [0])[0] % len(cut.in_shape)
    mask, indices = cut.input_mask(axis), integers(cut.node, 1)
    if mask is None or indices is None:
        return True
    where = np.asarray(indices, np.int64)
    where = np.where(where < 0, where + mask.size, where)
    position = np.cumsum(mask) - 1
    set_integers(cut.node, 1, position[where[mask[where]]].tolist())
    return True


def _pad(cut: Cut) -> bool:
    begins, ends = integers(cut.node, 1), integers(cut.node, 2)
    if begins is None or ends is None:
        return True
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        mask = cut.output_mask(axis)
        if mask is not None:
            begins[axis] = int(mask[:begin].sum())
            ends[axis] = int(mask[mask.size - end :].sum())
    set_integers(cut.node, 1, begins)
    set_integers(cut.node, 2, ends)
    return True


def _squeeze(cut: Cut) -> bool:
    if cut.node.get_input_size() > 1:
        return True
    axes = [axis for axis, size in enumerate(cut.in_shape) if size == 1]
    squeezed = opset.squeeze(cut.node.input_value(0), opset.constant(np.asarray(axes, np.int64)))
    replace_node(cut.node, squeezed)
    return False


def _interpolate(cut: Cut) -> bool:
    if str(cut.node.get_attributes()["shape_calculation_mode"]).lower() != "sizes":
        return True
    port = {"opset4": 3, "opset11": 2}[cut.node.get_type_info().version_id]
    axes = integers(cut.node, port) if cut.node.get_input_size() > port else list(range(len(cut.in_shape)))
    values = {}
    for position, axis in enumerate(axes or []):
        mask = cut.output_mask(axis % len(cut.in_shape))
        if mask is not None:
            values[position] = int(mask.sum())
    if values:
        patch_integers(cut.node, 1, values)
    return True


def _shape_of(cut: Cut) -> bool:
    """Go on giving the sizes of the whole model: what is computed from them then stays as it was."""
    sizes = {axis: cut.in_shape[axis] for axis, mask in enumerate(cut.inputs[0]) if mask is not None}
    readers = list(cut.node.output(0).get_target_inputs())
    kind = cut.node.get_output_element_type(0)
    if all(size is not None for size in cut.in_shape):
        whole = opset.constant(np.asarray(cut.in_shape, np.int64), dtype=kind)
    else:
        whole = opset.scatter_update(
            cut.node.output(0),
            opset.constant(np.asarray(list(sizes), np.int64)),
            opset.constant(np.asarray(list(sizes.values()), np.int64), dtype=kind),
            opset.constant(np.int64(0)),
        )
    for reader in readers:
        reader.replace_source_output(whole.output(0))
    return True


REWRITES: dict[str, Rewrite] = {
    "Broadcast": _target_shape,
    "Gather": _gather,
    "Interpolate": _interpolate,
    "Pad": _pad,
    "Reshape": _reshape,
    "ShapeOf": _shape_of,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "VariadicSplit": _split,
}
