"""Operator rules of the coupling: those that merge, split, move, add and remove dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov

from vinoopt.compression.constants import integers, out_shape
from vinoopt.compression.coupling import Labels, Site, Trace


def reshape(trace: Trace, node: ov.Node) -> None:
    """Runs of dimensions with equal products are passed, merged or split; what cannot be matched stays."""
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
    """Labels move with their dimensions."""
    dims, order = trace.dims(node, 0), integers(node, 1)
    if dims is None or order is None:
        trace.freeze_node(node, "its order is not constant")
        return
    trace.put(node, tuple(dims[axis] for axis in (order or range(len(dims))[::-1])))


def squeeze(trace: Trace, node: ov.Node) -> None:
    """What is removed stays at size 1."""
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
    """New dimensions stay at size 1."""
    dims, axes = trace.dims(node, 0), integers(node, 1)
    if dims is None or axes is None:
        trace.freeze_node(node, "its axes are not constant")
        return
    rank = len(dims) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(dims)
    one = trace.fixed(1, f"'{node.get_friendly_name()}' adds it")
    trace.put(node, tuple(one if axis in new else next(rest) for axis in range(rank)))
