"""Rules of operators that move, cut, join and pick values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import openvino as ov
import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.distillation.rules import Function, refuse, rule, to_type, whole


@rule("Reshape")
def _reshape(node: ov.Node) -> Function:
    keeps_zero = bool(node.get_attributes()["special_zero"])

    def reshape(x: Any, shape: Any) -> Any:
        sizes = whole(shape)
        if keeps_zero:
            sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


@rule("Transpose")
def _transpose(node: ov.Node) -> Function:
    def transpose(x: Any, order: Any) -> Any:
        return x.permute(whole(order) or list(range(x.ndim))[::-1])

    return transpose


@rule("Squeeze")
def _squeeze(node: ov.Node) -> Function:
    def squeeze(x: Any, axes: Any = None) -> Any:
        dims = [i for i, size in enumerate(x.shape) if size == 1] if axes is None else whole(axes)
        dims = [d % x.ndim for d in dims]
        return x.reshape([size for i, size in enumerate(x.shape) if i not in dims or size != 1])

    return squeeze


@rule("Unsqueeze")
def _unsqueeze(node: ov.Node) -> Function:
    def unsqueeze(x: Any, axes: Any) -> Any:
        dims = whole(axes)
        rank = x.ndim + len(dims)
        for dim in sorted(d % rank for d in dims):
            x = x.unsqueeze(dim)
        return x

    return unsqueeze


@rule("Concat")
def _concat(node: ov.Node) -> Function:
    axis = int(node.get_attributes()["axis"])

    def concat(*parts: Any) -> Any:
        if axis % parts[0].ndim:  # a constant, as the class token is, has one call's batch where others have several
            most = max(len(part) for part in parts)
            parts = tuple(p if len(p) == most else p.repeat(most // len(p), *[1] * (p.ndim - 1)) for p in parts)
        return torch.cat(parts, dim=axis)

    return concat


@rule("Split")
def _split(node: ov.Node) -> Function:
    count = int(node.get_attributes()["num_splits"])
    return lambda x, axis: torch.split(x, x.shape[int(axis)] // count, dim=int(axis))


@rule("VariadicSplit")
def _variadic_split(node: ov.Node) -> Function:
    def split(x: Any, axis: Any, lengths: Any) -> Any:
        sizes, dim = whole(lengths), int(axis)
        left = x.shape[dim] - sum(size for size in sizes if size >= 0)
        return torch.split(x, [left if size < 0 else size for size in sizes], dim=dim)

    return split


@rule("Slice")
def _slice(node: ov.Node) -> Function:
    def cut(x: Any, start: Any, stop: Any, step: Any, axes: Any = None) -> Any:
        starts = whole(start)
        dims = list(range(len(starts))) if axes is None else whole(axes)
        for dim, *bounds in zip(dims, starts, whole(stop), whole(step), strict=True):
            x = _cut(x, dim, *bounds)
        return x

    return cut


def _cut(x: Any, dim: int, start: int | None, stop: int | None, step: int) -> Any:
    places = range(*slice(start, stop, step).indices(x.shape[dim]))
    if step > 0:
        return x.narrow(dim, places.start, len(places)) if step == 1 else _strided(x, dim, places)
    return x.index_select(dim, torch.tensor(list(places), dtype=torch.int64, device=x.device))


def _strided(x: Any, dim: int, places: range) -> Any:
    index = [slice(None)] * x.ndim
    index[dim] = slice(places.start, max(places.stop, places.start), places.step)
    return x[tuple(index)]


@rule("StridedSlice")
def _strided_slice(node: ov.Node) -> Function:
    masks = node.get_attributes()

    def is_set(name: str, place: int) -> bool:
        mask = masks[name]
        return place < len(mask) and bool(mask[place])

    def cut(x: Any, begin: Any, end: Any, strides: Any = None) -> Any:
        starts, stops = whole(begin), whole(end)
        steps = [1] * len(starts) if strides is None else whole(strides)
        dim = 0
        for place, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
            if is_set("ellipsis_mask", place):
                dim = x.ndim - sum(not is_set("new_axis_mask", later) for later in range(place + 1, len(starts)))
                continue
            if is_set("new_axis_mask", place):
                x = x.unsqueeze(dim)
            elif is_set("shrink_axis_mask", place):
                x = x.select(dim, start)
                continue
            else:
                first = None if is_set("begin_mask", place) else start
                last = None if is_set("end_mask", place) else stop
                x = _cut(x, dim, first, last, step)
            dim += 1
        return x

    return cut


@rule("Pad")
def _pad(node: ov.Node) -> Function:
    mode = str(node.get_attributes()["pad_mode"])

    def pad(x: Any, begin: Any, end: Any, value: Any = None) -> Any:
        for dim, (before, after) in enumerate(zip(whole(begin), whole(end), strict=True)):
            if before < 0 or after < 0:
                x = x.narrow(dim, max(-before, 0), x.shape[dim] + min(before, 0) + min(after, 0))
        pairs = [(max(b, 0), max(a, 0)) for b, a in zip(whole(begin), whole(end), strict=True)]
        if mode == "constant":
            flat = list(chain.from_iterable(reversed(pairs)))
            return F.pad(x, flat, value=0.0 if value is None else float(value))
        for dim, (before, after) in enumerate(pairs):
            if before or after:
                x = x.index_select(dim, _mirrored(x.shape[dim], before, after, mode).to(x.device))
        return x

    return pad


def _mirrored(size: int, before: int, after: int, mode: str) -> Any:
    """Which index lies at each place of a padded axis."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "reflect":
        places = places.abs()
        return torch.where(places >= size, 2 * (size - 1) - places, places)
    places = torch.where(places < 0, -places - 1, places)  # symmetric
    return torch.where(places >= size, 2 * size - 1 - places, places)


@rule("Gather")
def _gather(node: ov.Node) -> Function:
    batch_dims = int(node.get_attributes().get("batch_dims", 0))

    def gather(x: Any, indices: Any, axis: Any) -> Any:
        dim, shared = int(axis) % x.ndim, batch_dims % max(indices.ndim, 1)
        if shared:
            common = x.shape[:shared]
            rows = zip(x.flatten(0, shared - 1), indices.flatten(0, shared - 1), strict=True)
            picked = torch.stack([pick(row, each, dim - shared) for row, each in rows])
            return picked.reshape(*common, *picked.shape[1:])
        return pick(x, indices, dim)

    def pick(x: Any, indices: Any, dim: int) -> Any:
        flat = indices.reshape(-1).to(torch.int64)
        flat = torch.where(flat < 0, flat + x.shape[dim], flat)
        picked = x.index_select(dim, flat.to(x.device))
        return picked.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])

    return gather


@rule("GatherElements")
def _gather_elements(node: ov.Node) -> Function:
    axis = int(node.get_attributes()["axis"])

    def gather(x: Any, indices: Any) -> Any:
        return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device))

    return gather


@rule("GatherND")
def _gather_nd(node: ov.Node) -> Function:
    if int(node.get_attributes().get("batch_dims", 0)):
        raise refuse(node, "batch dimensions")
    return lambda x, indices: x[tuple(indices.movedim(-1, 0))]


@rule("ScatterUpdate")
def _scatter_update(node: ov.Node) -> Function:
    def scatter(x: Any, indices: Any, updates: Any, axis: Any) -> Any:
        if indices.ndim > 1:
            raise refuse(node, "indices of several dimensions")
        return x.index_copy(int(axis), indices.reshape(-1), updates)

    return scatter


@rule("ScatterElementsUpdate")
def _scatter_elements(node: ov.Node) -> Function:
    if node.get_attributes().get("reduction", "none") != "none":
        raise refuse(node, "a reduction")
    return lambda x, indices, updates, axis: x.scatter(int(axis), indices.to(x.device), updates)


@rule("ScatterNDUpdate")
def _scatter_nd(node: ov.Node) -> Function:
    if node.get_attributes().get("reduction", "none") != "none":
        raise refuse(node, "a reduction")
    return lambda x, indices, updates: x.index_put(tuple(indices.movedim(-1, 0)), updates)


@rule("Tile")
def _tile(node: ov.Node) -> Function:
    return lambda x, repeats: x.tile(whole(repeats))


@rule("Broadcast")
def _broadcast(node: ov.Node) -> Function:
    mode = str(node.get_attributes()["mode"])
    if mode not in ("numpy", "bidirectional"):
        raise refuse(node, f"mode {mode}")

    def broadcast(x: Any, shape: Any) -> Any:
        sizes = whole(shape)
        if mode == "bidirectional":
            sizes = list(torch.broadcast_shapes(x.shape, sizes))
        return x.expand(sizes)

    return broadcast


@rule("ShapeOf")
def _shape_of(node: ov.Node) -> Function:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


@rule("Range")
def _range(node: ov.Node) -> Function:
    convert = to_type(str(node.get_attributes()["output_type"]))
    return lambda start, stop, step: convert(torch.arange(start.item(), stop.item(), step.item()))


@rule("OneHot")
def _one_hot(node: ov.Node) -> Function:
    axis = int(node.get_attributes()["axis"])

    def one_hot(indices: Any, depth: Any, on: Any, off: Any) -> Any:
        classes = torch.arange(int(depth), device=indices.device)
        hits = indices.unsqueeze(-1) == classes
        return torch.where(hits, on, off).movedim(-1, axis)

    return one_hot


@rule("TopK")
def _top_k(node: ov.Node) -> Function:
    a = node.get_attributes()
    axis, largest = int(a["axis"]), a["mode"] == "max"
    if a["sort"] == "index":
        raise refuse(node, "sorting by index")

    def top_k(x: Any, k: Any) -> Any:
        values, indices = torch.topk(x, int(k), dim=axis, largest=largest, sorted=True)
        return values, indices

    return top_k


@rule("Roll")
def _roll(node: ov.Node) -> Function:
    return lambda x, shift, axes: x.roll(_paired(whole(shift), whole(axes)), whole(axes))


def _paired(shifts: list[int], axes: list[int]) -> list[int]:
    """One shift per axis, where one may be given for all."""
    return shifts * len(axes) if len(shifts) == 1 else shifts


@rule("Reverse")
def _reverse(node: ov.Node) -> Function:
    if str(node.get_attributes()["mode"]) != "index":
        raise refuse(node, "a mask")
    return lambda x, axes: x.flip(whole(axes))


@rule("ReverseSequence")
def _reverse_sequence(node: ov.Node) -> Function:
    a = node.get_attributes()
    batch, sequence = int(a["batch_axis"]), int(a["seq_axis"])

    def reverse(x: Any, lengths: Any) -> Any:
        rows = []
        for row, length in zip(x.unbind(batch), whole(lengths), strict=True):
            dim = sequence - (sequence > batch)
            head = row.narrow(dim, 0, length).flip(dim)
            rows.append(torch.cat([head, row.narrow(dim, length, row.shape[dim] - length)], dim))
        return torch.stack(rows, batch)

    return reverse


@rule("ShuffleChannels")
def _shuffle(node: ov.Node) -> Function:
    axis, groups = int(node.get_attributes()["axis"]), int(node.get_attributes()["group"])

    def shuffle(x: Any) -> Any:
        dim = axis % x.ndim
        split = x.reshape(*x.shape[:dim], groups, x.shape[dim] // groups, *x.shape[dim + 1 :])
        return split.transpose(dim, dim + 1).reshape(x.shape)

    return shuffle


@rule("DepthToSpace", "SpaceToDepth")
def _depth_space(node: ov.Node) -> Function:
    block, blocks_first = int(node.get_attributes()["block_size"]), node.get_attributes()["mode"] == "blocks_first"
    to_space = node.get_type_name() == "DepthToSpace"

    def depth_to_space(x: Any) -> Any:
        n, c, *sizes = x.shape
        rank, inner = len(sizes), c // block ** len(sizes)
        blocks = [block] * rank
        x = x.reshape(n, *blocks, inner, *sizes) if blocks_first else x.reshape(n, inner, *blocks, *sizes)
        first = 1 if blocks_first else 2
        order = [0, rank + 1 if blocks_first else 1, *_interleaved(range(rank + 2, 2 * rank + 2), first)]
        return x.permute(order).reshape(n, inner, *[s * block for s in sizes])

    def space_to_depth(x: Any) -> Any:
        n, c, *sizes = x.shape
        rank = len(sizes)
        x = x.reshape(n, c, *chain.from_iterable((s // block, block) for s in sizes))
        cells, places = [3 + 2 * i for i in range(rank)], [2 + 2 * i for i in range(rank)]
        order = [0, *cells, 1, *places] if blocks_first else [0, 1, *cells, *places]
        return x.permute(order).reshape(n, c * block**rank, *[s // block for s in sizes])

    return depth_to_space if to_space else space_to_depth


def _interleaved(places: Sequence[int], first: int) -> list[int]:
    return list(chain.from_iterable((place, first + i) for i, place in enumerate(places)))


@rule("Einsum")
def _einsum(node: ov.Node) -> Function:
    equation = str(node.get_attributes()["equation"])
    return lambda *parts: torch.einsum(equation, *parts)
