"""Operator rules of the coupling: those that move, cut, join or repeat indices.

They carry labels through index maps; what they hold as constants (lengths, starts, target shapes) is rewritten
by `rewrites.py` from the labels that stay.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov

from vinoopt.compression.constants import integers, out_shape
from vinoopt.compression.coupling import Labels, Trace
from vinoopt.compression.reshape_rules import reshape, squeeze, transpose, unsqueeze

Rule = Callable[[Trace, ov.Node], None]


# --------------------------------------------------------------------------- joining and cutting


def concat(trace: Trace, node: ov.Node) -> None:
    """Labels are joined on the axis and linked on all others."""
    inputs = [trace.dims(node, port) for port in range(node.get_input_size())]
    found = [dims for dims in inputs if dims is not None]
    if len(found) != len(inputs):
        trace.freeze_node(node, "unknown rank")
        return
    name = node.get_friendly_name()
    axis = int(node.get_attributes()["axis"]) % len(found[0])
    result = list(found[0])
    for other in range(len(result)):
        for dims in found[1:]:
            if other != axis:
                trace.link(result[other], dims[other], f"'{name}' joins it")
                if result[other] is None:
                    result[other] = dims[other]
    parts = [dims[axis] for dims in found if dims[axis] is not None]
    if len(parts) == len(found):
        result[axis] = np.concatenate([labels for labels in parts if labels is not None])
    else:
        for labels in parts:
            trace.freeze(labels, f"'{name}' joins it with a size that is not known")
        result[axis] = None
    trace.put(node, tuple(result))


def split(trace: Trace, node: ov.Node) -> None:
    """`Split` and `VariadicSplit`: lengths are rewritten, so parts need not stay equal."""
    dims, axes = trace.dims(node, 0), integers(node, 1)
    if dims is None or axes is None:
        trace.freeze_node(node, "its axis is not constant")
        return
    axis = axes[0] % len(dims)
    whole = dims[axis]
    if whole is None:
        trace.put(node, *(trace.fixed_dims(output, "part of an unknown size") for output in node.outputs()))
        _relabel_parts(trace, node, dims, axis)
        return
    sizes = []
    for port in range(node.get_output_size()):
        shape = out_shape(node, port)
        sizes.append(None if shape is None else shape[axis])
    lengths = [size for size in sizes if size is not None]
    if len(lengths) != len(sizes) or sum(lengths) != whole.size:
        trace.freeze_node(node, "its lengths are not known")
        return
    parts = np.split(whole, np.cumsum(lengths)[:-1])
    if node.get_type_name() == "VariadicSplit" and integers(node, 2) is None:
        trace.freeze(whole, f"lengths of '{node.get_friendly_name()}' are not constant")
    trace.put(node, *((*dims[:axis], part, *dims[axis + 1 :]) for part in parts))


def _relabel_parts(trace: Trace, node: ov.Node, dims: tuple[Labels | None, ...], axis: int) -> None:
    for port in range(node.get_output_size()):
        made = trace.tensors[node.get_name(), port]
        if made is not None:
            trace.tensors[node.get_name(), port] = (*dims[:axis], made[axis], *dims[axis + 1 :])


def slice_(trace: Trace, node: ov.Node) -> None:
    """With step 1 labels are cut as the tensor is; other steps freeze what they step over."""
    dims = trace.dims(node, 0)
    starts, stops, steps = (integers(node, port) for port in (1, 2, 3))
    has_axes = node.get_input_size() > 4
    axes = integers(node, 4) if has_axes else (list(range(len(starts))) if starts is not None else None)
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    shape = out_shape(node) or []
    result = list(dims)
    for position, axis in enumerate(axis % len(dims) for axis in axes):
        labels = dims[axis]
        why = f"'{node.get_friendly_name()}' cuts it"
        if labels is None or starts is None or stops is None or steps is None:
            trace.freeze(labels, why)
            size = shape[axis]
            result[axis] = None if size is None else trace.fixed(size, why)
            continue
        if steps[position] != 1:
            trace.freeze(labels, why)
        result[axis] = labels[_window(starts[position], stops[position], steps[position], labels.size)]
    trace.put(node, tuple(result))


def _window(start: int, stop: int, step: int, size: int) -> slice:
    """The python slice of a `Slice`, whose bounds are clamped and may count from the end."""
    start = start + size if start < 0 else start
    stop = stop + size if stop < 0 else stop
    if step > 0:
        return slice(min(max(start, 0), size), min(max(stop, 0), size), step)
    stop = min(max(stop, -1), size - 1)
    return slice(min(max(start, 0), size - 1), None if stop < 0 else stop, step)


def strided_slice(trace: Trace, node: ov.Node) -> None:
    """The same, with masks."""
    dims, attributes = trace.dims(node, 0), node.get_attributes()
    starts, stops = integers(node, 1), integers(node, 2)
    steps = integers(node, 3) if node.get_input_size() > 3 else [1] * len(starts or [])
    if (
        dims is None
        or starts is None
        or stops is None
        or steps is None
        or any(attributes["new_axis_mask"])
        or any(attributes["ellipsis_mask"])
    ):
        trace.freeze_node(node, "a slice with new axes, an ellipsis, or bounds that are not constant")
        return

    def masked(name: str, axis: int) -> bool:
        mask = attributes[name]
        return axis < len(mask) and bool(mask[axis])

    shape, result = out_shape(node) or [], []
    for axis, labels in enumerate(dims):
        why = f"'{node.get_friendly_name()}' cuts it"
        if axis >= len(starts):
            result.append(labels)
        elif masked("shrink_axis_mask", axis):
            trace.freeze(labels, why)
        elif labels is None:
            size = shape[len(result)]
            result.append(None if size is None else trace.fixed(size, why))
        else:
            if steps[axis] != 1:
                trace.freeze(labels, why)
            everything = labels.size if steps[axis] > 0 else -labels.size - 1
            start = (0 if steps[axis] > 0 else -1) if masked("begin_mask", axis) else starts[axis]
            stop = everything if masked("end_mask", axis) else stops[axis]
            result.append(labels[_window(start, stop, steps[axis], labels.size)])
    trace.put(node, tuple(result))


def pad(trace: Trace, node: ov.Node) -> None:
    """A constant pad makes free atoms in the padded zone: a shortcut may widen its channels that way."""
    dims, begins, ends = trace.dims(node, 0), integers(node, 1), integers(node, 2)
    if dims is None or begins is None or ends is None:
        trace.freeze_node(node, "its widths are not constant")
        return
    is_constant = str(node.get_attributes()["pad_mode"]).lower() == "constant"
    why = f"'{node.get_friendly_name()}' pads it"
    result: list[Labels | None] = []
    for labels, begin, end in zip(dims, begins, ends, strict=True):
        if labels is None or (begin == 0 and end == 0):
            result.append(labels)
        elif is_constant and begin >= 0 and end >= 0:
            result.append(np.concatenate([trace.atoms(begin, why), labels, trace.atoms(end, why)]))
        else:
            trace.freeze(labels, why)
            result.append(trace.fixed(labels.size + begin + end, why))
    trace.put(node, tuple(result))


def gather(trace: Trace, node: ov.Node) -> None:
    """Constant indices pick labels; other lookups freeze the axis. A lookup in a constant table makes its width."""
    data, axes, indices = trace.dims(node, 0), integers(node, 2), integers(node, 1)
    index_shape = node.get_input_partial_shape(1)
    batch_dims = int(node.get_attributes().get("batch_dims", 0))
    if data is None or axes is None or index_shape.rank.is_dynamic or batch_dims != 0:
        trace.freeze_node(node, "its axis is not constant")
        return
    axis = axes[0] % len(data)
    labels, why = data[axis], f"'{node.get_friendly_name()}' looks up in it"
    if indices is not None and labels is not None and len(index_shape) == 1:
        where = np.asarray(indices, np.int64)
        picked: tuple[Labels | None, ...] = (labels[np.where(where < 0, where + labels.size, where)],)
    else:
        trace.freeze(labels, why)
        size = len(index_shape)
        whole = trace.fixed_dims(node.output(0), why)
        if trace.is_constant(node, 1):
            for each in trace.dims(node, 1) or ():
                trace.freeze(each, why)
        picked = whole[axis : axis + size] if whole is not None else (None,) * size
    out = (*data[:axis], *picked, *data[axis + 1 :])
    trace.put(node, out)
    if trace.is_constant(node, 0) and not trace.is_constant(node, 1) and len(data) == 2 and axis == 0:
        trace.embeddings.append((node.get_friendly_name(), data[1]))


# --------------------------------------------------------------------------- repeating and rearranging


def broadcast_to(trace: Trace, node: ov.Node) -> None:
    """What is repeated into a new size is free to lose it again."""
    dims, shape = trace.dims(node, 0), out_shape(node)
    mode = str(node.get_attributes()["mode"]).lower()
    if dims is None or shape is None or mode not in ("numpy", "bidirectional") or len(dims) > len(shape):
        trace.freeze_node(node, "explicit axes, or a rank that is not known")
        return
    why = f"'{node.get_friendly_name()}' repeats it"
    lead = len(shape) - len(dims)
    result: list[Labels | None] = []
    for position, size in enumerate(shape):
        labels = dims[position - lead] if position >= lead else None
        if size is None or (position >= lead and labels is None):
            trace.freeze(labels, why)
            result.append(None if size is None else trace.fixed(size, why))
        elif labels is not None and labels.size == size:
            result.append(labels)
        else:
            trace.freeze(labels, why)
            result.append(trace.atoms(size, why))
    trace.put(node, tuple(result))


def tile(trace: Trace, node: ov.Node) -> None:
    """Labels are repeated as the tensor is."""
    dims, repeats, shape = trace.dims(node, 0), integers(node, 1), out_shape(node)
    if dims is None or repeats is None or shape is None or len(repeats) > len(dims):
        trace.freeze_node(node, "its repeats are not constant")
        return
    repeats = [1] * (len(dims) - len(repeats)) + repeats
    # Labels that lie twice in one dimension go twice: the repeats stay what they are.
    trace.put(node, tuple(None if d is None else np.tile(d, r) for d, r in zip(dims, repeats, strict=True)))


def interpolate(trace: Trace, node: ov.Node) -> None:
    """Axes that keep their size pass, resized ones stay."""
    dims, shape, attributes = trace.dims(node, 0), out_shape(node), node.get_attributes()
    version = node.get_type_info().version_id
    port = {"opset4": 3, "opset11": 2}.get(version)
    if dims is None or shape is None or port is None:
        trace.freeze_node(node, f"version {version} of it, or a rank that is not known")
        return
    axes = integers(node, port) if node.get_input_size() > port else list(range(len(dims)))
    padded = any(attributes["pads_begin"]) or any(attributes["pads_end"])
    if axes is None or padded:
        trace.freeze_node(node, "its axes are not constant, or it pads")
        return
    why, result = f"'{node.get_friendly_name()}' resizes it", list(dims)
    shifts = "tf_half_pixel" in str(attributes["coordinate_transformation_mode"]).lower()
    keeps_size = integers(node, 1) is not None or str(attributes["shape_calculation_mode"]).lower() == "sizes"
    for axis in (axis % len(dims) for axis in axes):
        labels, size = dims[axis], shape[axis]
        if labels is not None and size == labels.size and not shifts and keeps_size:
            continue
        trace.freeze(labels, why)
        result[axis] = None if size is None else trace.fixed(size, why)
    trace.put(node, tuple(result))


def shuffle_channels(trace: Trace, node: ov.Node) -> None:
    """Equal positions of all blocks live or die together, so that the number of blocks stays."""
    dims, attributes = trace.dims(node, 0), node.get_attributes()
    axis = int(attributes["axis"]) % len(dims or (1,))
    labels = None if dims is None else dims[axis]
    if dims is None or labels is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    blocks = labels.reshape(int(attributes["group"]), -1)
    for block in blocks[1:]:
        trace.link(blocks[0], block, f"'{node.get_friendly_name()}' shuffles it")
    trace.put(node, (*dims[:axis], blocks.T.reshape(-1), *dims[axis + 1 :]))


def depth_to_space(trace: Trace, node: ov.Node) -> None:
    """Channels that make one output channel are linked."""
    dims, attributes = trace.dims(node, 0), node.get_attributes()
    if dims is None or dims[1] is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    name = node.get_friendly_name()
    count = int(attributes["block_size"]) ** (len(dims) - 2)
    blocks_first = str(attributes["mode"]).lower() == "blocks_first"
    blocks = dims[1].reshape(count, -1) if blocks_first else dims[1].reshape(-1, count).T
    for block in blocks[1:]:
        trace.link(blocks[0], block, f"'{name}' rearranges it")
    for labels in dims[2:]:
        trace.freeze(labels, f"'{name}' rearranges it")
    fixed = trace.fixed_dims(node.output(0), f"'{name}' rearranges it") or ()
    trace.put(node, (dims[0], blocks[0], *fixed[2:]))


def space_to_depth(trace: Trace, node: ov.Node) -> None:
    """A channel lies in several output channels."""
    dims, attributes = trace.dims(node, 0), node.get_attributes()
    if dims is None or dims[1] is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    name = node.get_friendly_name()
    count = int(attributes["block_size"]) ** (len(dims) - 2)
    blocks_first = str(attributes["mode"]).lower() == "blocks_first"
    channels = np.tile(dims[1], count) if blocks_first else np.repeat(dims[1], count)
    for labels in dims[2:]:
        trace.freeze(labels, f"'{name}' rearranges it")
    fixed = trace.fixed_dims(node.output(0), f"'{name}' rearranges it") or ()
    trace.put(node, (dims[0], channels, *fixed[2:]))


SHAPE_RULES: dict[str, Rule] = {
    "Broadcast": broadcast_to,
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Gather": gather,
    "Interpolate": interpolate,
    "Pad": pad,
    "Reshape": reshape,
    "ShuffleChannels": shuffle_channels,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "StridedSlice": strided_slice,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "VariadicSplit": split,
}
