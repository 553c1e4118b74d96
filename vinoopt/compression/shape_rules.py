"""Operator rules of the coupling: those that move, cut, join or repeat indices.

They carry labels through index maps; what they hold as constants (lengths, starts, target shapes) is rewritten
by `rewrites.py` from the labels that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov

from vinoopt.compression.coupling import Dims, Labels, Site, Trace

Rule = Callable[[Trace, ov.Node], None]


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


# --------------------------------------------------------------------------- reshape


def reshape(trace: Trace, node: ov.Node) -> None:
    dims, target = trace.dims(node, 0), out_shape(node)
    if dims is None or target is None:
        trace.freeze_node(node, "unknown rank")
        return
    source = [None if labels is None else labels.size for labels in dims]
    if 0 in source or 0 in target:
        trace.freeze_node(node, "an empty tensor")
        return
    pattern = integers(node, 1) if node.get_attributes()["special_zero"] else None
    result: list[Labels | None] = [None] * len(target)
    why = f"reshape '{node.get_friendly_name()}'"
    segments, (middle_in, middle_out) = _segments(source, target, pattern)
    for axis in middle_in:
        trace.freeze(dims[axis], f"{why} mixes it with a size that is not known")
    for axis in middle_out:
        size = target[axis]
        result[axis] = (
            None if size is None else trace.fixed(size, f"{why} mixes it with a size that is not known")
        )
    for number, (ins, outs) in enumerate(segments):
        made = _regroup(trace, node, number, ([dims[i] for i in ins], [target[j] for j in outs]))
        for axis, labels in zip(outs, made, strict=True):
            result[axis] = labels
    trace.put(node, tuple(result))


Segment = tuple[list[int], list[int]]


def _segments(
    source: Sequence[int | None], target: Sequence[int | None], pattern: Sequence[int] | None
) -> tuple[list[Segment], Segment]:
    """Runs of input and output axes with equal products, and what is left in the middle."""
    segments: list[Segment] = []
    low_in, low_out, high_in, high_out = 0, 0, len(source), len(target)
    while low_in < high_in and low_out < high_out:
        taken = _run(source[low_in:high_in], target[low_out:high_out])
        if taken is None:
            copied = pattern is not None and low_in == low_out and pattern[low_out] == 0
            if not (copied and source[low_in] is None and target[low_out] is None):
                break
            taken = (1, 1)
        else:
            segments.append(
                (list(range(low_in, low_in + taken[0])), list(range(low_out, low_out + taken[1])))
            )
        low_in, low_out = low_in + taken[0], low_out + taken[1]
    while low_in < high_in and low_out < high_out:
        taken = _run(source[low_in:high_in][::-1], target[low_out:high_out][::-1])
        if taken is None:
            break
        segments.append(
            (list(range(high_in - taken[0], high_in)), list(range(high_out - taken[1], high_out)))
        )
        high_in, high_out = high_in - taken[0], high_out - taken[1]
    for axis in range(low_in, high_in):
        if source[axis] == 1:
            segments.append(([axis], []))
    for axis in range(low_out, high_out):
        if target[axis] == 1:
            segments.append(([], [axis]))
    done_in = {i for ins, _ in segments for i in ins}
    done_out = {j for _, outs in segments for j in outs}
    middle_in = [i for i in range(low_in, high_in) if i not in done_in]
    middle_out = [j for j in range(low_out, high_out) if j not in done_out]
    return segments, (middle_in, middle_out)


def _run(source: Sequence[int | None], target: Sequence[int | None]) -> tuple[int, int] | None:
    """How many leading sizes of each side it takes until the products agree."""
    taken_in, taken_out = 1, 1
    left, right = source[0], target[0]
    while left is not None and right is not None and left != right:
        if left < right:
            if taken_in >= len(source):
                return None
            following = source[taken_in]
            left = None if following is None else left * following
            taken_in += 1
        else:
            if taken_out >= len(target):
                return None
            following = target[taken_out]
            right = None if following is None else right * following
            taken_out += 1
    return None if left is None or right is None else (taken_in, taken_out)


def _regroup(
    trace: Trace, node: ov.Node, number: int, sides: tuple[list[Labels | None], list[int | None]]
) -> list[Labels]:
    """Labels of the output axes of one run: sizes of 1 are set aside, the rest is merged, split or passed."""
    why = f"reshape '{node.get_friendly_name()}'"
    ins = [labels for labels in sides[0] if labels is not None and labels.size > 1]
    sizes = [size for size in sides[1] if size is not None and size > 1]
    if not sizes:
        ones = [labels for labels in sides[0] if labels is not None]
        if len(ones) == 1 and len(sides[1]) == 1:
            return ones
        for labels in ones:
            trace.freeze(labels, why)
        return [trace.fixed(1, why) for _ in sides[1]]
    for each in sides[0]:
        if each is not None and each.size == 1:
            trace.freeze(each, why)
    flat = ins[0] if len(ins) == 1 else _merge(trace, node, number, ins)
    parts = [flat] if len(sizes) == 1 else _split(trace, node, number, (flat, sizes))
    made = iter(parts)
    return [next(made) if size != 1 else trace.fixed(1, why) for size in sides[1]]


def _merge(trace: Trace, node: ov.Node, number: int, factors: list[Labels]) -> Labels:
    sizes = [labels.size for labels in factors]
    free = [index for index, labels in enumerate(factors) if (labels >= 0).any()]
    if len(free) <= 1:
        # The others are frozen from birth: no choice to make.
        index = free[0] if free else 0
        shape = [1] * len(sizes)
        shape[index] = -1
        flat: Labels = np.broadcast_to(factors[index].reshape(shape), sizes).reshape(-1)
        return flat
    flat = trace.atoms(int(np.prod(sizes)), f"'{node.get_friendly_name()}' is too long to be channels")
    key = (node.get_name(), f"merge {number}")
    trace.sites.append(Site(key=key, layer=node.get_friendly_name(), flat=flat, factors=tuple(factors)))
    return flat


def _split(trace: Trace, node: ov.Node, number: int, run: tuple[Labels, list[int]]) -> list[Labels]:
    flat, sizes = run
    name = node.get_friendly_name()
    if not (flat >= 0).any():
        return [np.broadcast_to(flat[:1], (size,)) for size in sizes]
    factors = [trace.atoms(size, f"'{name}' is too long to be channels") for size in sizes]
    key = (node.get_name(), f"split {number}")
    trace.sites.append(Site(key=key, layer=name, flat=flat, factors=tuple(factors)))
    return factors


def transpose(trace: Trace, node: ov.Node) -> None:
    dims, order = trace.dims(node, 0), integers(node, 1)
    if dims is None or order is None:
        trace.freeze_node(node, "its order is not constant")
        return
    trace.put(node, tuple(dims[axis] for axis in (order or range(len(dims))[::-1])))


def squeeze(trace: Trace, node: ov.Node) -> None:
    dims = trace.dims(node, 0)
    axes = integers(node, 1)
    rank = node.get_output_partial_shape(0).rank
    if dims is None or rank.is_dynamic:
        trace.freeze_node(node, "unknown rank")
        return
    if axes is None:
        axes = [axis for axis, labels in enumerate(dims) if labels is not None and labels.size == 1]
    axes = [axis % len(dims) for axis in axes]
    # Newer versions leave axes of another size than 1 alone; such an axis must not shrink to 1.
    for axis in axes:
        if _longer(dims[axis]):
            trace.freeze(dims[axis], f"'{node.get_friendly_name()}' would remove it at size 1")
    axes = [axis for axis in axes if not _longer(dims[axis])]
    if len(dims) - len(axes) != rank.get_length():
        trace.freeze_node(node, "the axes it removes are not known")
        return
    for axis in axes:
        trace.freeze(dims[axis], f"'{node.get_friendly_name()}' removes it")
    trace.put(node, tuple(labels for axis, labels in enumerate(dims) if axis not in axes))


def _longer(labels: Labels | None) -> bool:
    return labels is not None and labels.size > 1


def unsqueeze(trace: Trace, node: ov.Node) -> None:
    dims, axes = trace.dims(node, 0), integers(node, 1)
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    rank = len(dims) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(dims)
    one = trace.fixed(1, f"'{node.get_friendly_name()}' adds it")
    trace.put(node, tuple(one if axis in new else next(rest) for axis in range(rank)))


# --------------------------------------------------------------------------- joining and cutting


def concat(trace: Trace, node: ov.Node) -> None:
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
    dims, repeats, shape = trace.dims(node, 0), integers(node, 1), out_shape(node)
    if dims is None or repeats is None or shape is None or len(repeats) > len(dims):
        trace.freeze_node(node, "its repeats are not constant")
        return
    repeats = [1] * (len(dims) - len(repeats)) + repeats
    # Labels that lie twice in one dimension go twice: the repeats stay what they are.
    trace.put(node, tuple(None if d is None else np.tile(d, r) for d, r in zip(dims, repeats, strict=True)))


def interpolate(trace: Trace, node: ov.Node) -> None:
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

__all__ = ["SHAPE_RULES", "Dims", "constant_value", "integers", "out_shape"]
