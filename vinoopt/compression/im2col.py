"""Rows of a contraction: what sampled output positions read (im2col), and what they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vinoopt.compression.contractions import Array, Contraction
from vinoopt.errors import CompressionError

Indices: TypeAlias = NDArray[np.intp]


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
        if contraction.is_transposed:
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
        return rank - 1 if rank == 1 or self._contraction.is_flipped(port) == (port == 1) else rank - 2

    def positions(self, output_shape: Sequence[int], count: int, rng: np.random.Generator) -> Indices:
        """[samples, <= count] random output positions without repetition, the same number for every sample."""
        samples, places = self._layout(tuple(output_shape))
        if places <= count:
            return np.broadcast_to(np.arange(places), (samples, places))
        keys = rng.random((samples, places))
        return np.sort(np.argpartition(keys, count, axis=1)[:, :count], axis=1)

    def _layout(self, shape: tuple[int, ...]) -> tuple[int, int]:
        axis = self._contraction.channel_axis % len(shape)
        rest = [size for index, size in enumerate(shape) if index != axis]
        return (rest[0], math.prod(rest[1:])) if rest else (1, 1)

    def output_rows(self, tensor: Array, positions: Indices) -> Array:
        """[rows, groups * outputs] of an output tensor (or one of its shape)."""
        axis = self._contraction.channel_axis % tensor.ndim
        samples, places = self._layout(tensor.shape)
        spread = np.moveaxis(tensor, axis, -1).reshape(samples, places, tensor.shape[axis])
        return _take(spread, positions)

    def channel_means(self, tensor: Array) -> NDArray[np.float64]:
        """[samples, groups * outputs]: mean of an output tensor over its positions."""
        axis = self._contraction.channel_axis % tensor.ndim
        samples, places = self._layout(tensor.shape)
        spread = np.moveaxis(tensor, axis, -1).reshape(samples, places, tensor.shape[axis])
        means: NDArray[np.float64] = spread.mean(axis=1, dtype=np.float64)
        return means

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
        rows = np.empty((samples, count, channels, taps), dtype=np.result_type(tensor.dtype, np.float32))
        for sample, chosen in enumerate(positions):
            patch = flat[sample][:, table[chosen].ravel()].reshape(channels, count, taps)
            rows[sample] = patch.transpose(1, 0, 2) * inside[chosen][:, None, :]
        groups = self._contraction.groups
        grouped: Array = rows.reshape(samples * count, groups, -1).transpose(1, 0, 2)
        return grouped


def _take(spread: Array, positions: Indices) -> Array:
    taken: Array = np.take_along_axis(spread, positions[:, :, None], axis=1)
    return _wide(taken.reshape(-1, spread.shape[-1]))


def _wide(rows: Array) -> Array:
    """Rows in float32 at least: half-precision models keep half-precision tensors, which must not be summed."""
    return rows.astype(np.result_type(rows.dtype, np.float32), copy=False)


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
        if contraction.is_transposed:
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
    if contraction.is_transposed:
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
