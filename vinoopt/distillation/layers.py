"""Rules of contractions, pools and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import openvino as ov
import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.distillation.rules import Function, refuse, rule, whole

_CONVOLUTIONS: dict[int, Function] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Function] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS: dict[int, Function] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS: dict[int, Function] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
Pads = Sequence[tuple[int, int]]


def _pads(node: ov.Node) -> Callable[[Sequence[int], Sequence[int]], Pads]:
    """From input sizes and kernel sizes to the pads of every axis, as the node's attributes say."""
    a = node.get_attributes()
    mode, strides = str(a["auto_pad"]), a["strides"]
    dilations = a.get("dilations") or [1] * len(strides)

    def pads(sizes: Sequence[int], kernel: Sequence[int]) -> Pads:
        if mode == "valid":
            return [(0, 0)] * len(kernel)
        if mode not in ("same_upper", "same_lower"):
            return list(zip(a["pads_begin"], a["pads_end"], strict=True))
        result = []
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            whole_pad = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
            less = whole_pad // 2
            result.append((less, whole_pad - less) if mode == "same_upper" else (whole_pad - less, less))
        return result

    return pads


def _flat(pads: Pads) -> list[int]:
    return list(chain.from_iterable(reversed(list(pads))))


@rule("Convolution", "GroupConvolution")
def _convolution(node: ov.Node) -> Function:
    a = node.get_attributes()
    pads_of, strides, dilations = _pads(node), list(a["strides"]), list(a["dilations"])
    is_grouped = node.get_type_name() == "GroupConvolution"

    def convolve(x: Any, weight: Any, bias: Any = None) -> Any:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU, forwards and back
        groups = 1
        if is_grouped:
            groups, weight = weight.shape[0], weight.flatten(0, 1)
        pads = pads_of(x.shape[2:], weight.shape[2:])
        if any(before != after for before, after in pads):
            x, pads = F.pad(x, _flat(pads)), [(0, 0)] * len(pads)
        padding = [before for before, _ in pads]
        return _CONVOLUTIONS[x.ndim - 2](x, weight, bias, strides, padding, dilations, groups)

    return convolve


@rule("ConvolutionBackpropData", "GroupConvolutionBackpropData")
def _transposed(node: ov.Node) -> Function:
    a = node.get_attributes()
    strides, dilations, extra = list(a["strides"]), list(a["dilations"]), list(a["output_padding"])
    is_grouped = node.get_type_name() == "GroupConvolutionBackpropData"
    if str(a["auto_pad"]) != "explicit" or node.get_input_size() > 2:
        raise refuse(node, "automatic padding or a given output shape")
    pads = list(zip(a["pads_begin"], a["pads_end"], strict=True))

    def convolve(x: Any, weight: Any) -> Any:
        groups = 1
        if is_grouped:
            groups, weight = weight.shape[0], weight.flatten(0, 1)
        y = _TRANSPOSED[x.ndim - 2](x, weight, None, strides, 0, 0, groups, dilations)
        if any(extra):
            y = F.pad(y, _flat([(0, e) for e in extra]))
        for dim, (before, after) in enumerate(pads, start=2):
            y = y.narrow(dim, before, y.shape[dim] - before - after)
        return y

    return convolve


@rule("MatMul")
def _matmul(node: ov.Node) -> Function:
    first, second = (bool(node.get_attributes()[key]) for key in ("transpose_a", "transpose_b"))

    def matmul(a: Any, b: Any) -> Any:
        a = a.transpose(-1, -2) if first and a.ndim > 1 else a
        b = b.transpose(-1, -2) if second and b.ndim > 1 else b
        return a @ b

    return matmul


# --------------------------------------------------------------------------- pools


def _window(node: ov.Node) -> Callable[[Any], tuple[Pads, Pads]]:
    """From an input to its pads, and to what rounding up adds behind them."""
    a = node.get_attributes()
    kernel, strides, rounding = a["kernel"], a["strides"], str(a["rounding_type"])
    dilations = a.get("dilations") or [1] * len(kernel)
    pads_of = _pads(node)

    def window(x: Any) -> tuple[Pads, Pads]:
        pads = pads_of(x.shape[2:], kernel)
        beyond = []
        for i, (before, after) in enumerate(pads):
            left = x.shape[2 + i] + before + after - (dilations[i] * (kernel[i] - 1) + 1)
            extra = -left % strides[i] if rounding.startswith("ceil") else 0
            last = (left + extra) // strides[i] * strides[i]
            if rounding == "ceil_torch" and last >= x.shape[2 + i] + before:
                extra = 0  # the last window would begin in the padding
            beyond.append((0, extra))
        return pads, beyond

    return window


@rule("MaxPool")
def _max_pool(node: ov.Node) -> Function:
    a = node.get_attributes()
    kernel, strides = list(a["kernel"]), list(a["strides"])
    dilations = list(a.get("dilations") or [1] * len(kernel))
    window = _window(node)
    if node.get_output_size() > 1 and node.output(1).get_target_inputs():
        raise refuse(node, "the indices")

    def pool(x: Any) -> Any:
        for pads in window(x):
            if any(chain.from_iterable(pads)):
                x = F.pad(x, _flat(pads), value=-math.inf)
        return _MAX_POOLS[len(kernel)](x, kernel, strides, 0, dilations)

    return pool


@rule("AvgPool")
def _avg_pool(node: ov.Node) -> Function:
    a = node.get_attributes()
    kernel, strides, excludes = list(a["kernel"]), list(a["strides"]), bool(a["exclude-pad"])
    window, pool = _window(node), _AVG_POOLS[len(kernel)]

    def average(x: Any) -> Any:
        pads, beyond = window(x)
        if not any(chain.from_iterable([*pads, *beyond])):
            return pool(x, kernel, strides)
        counted = x.new_ones(1, 1, *x.shape[2:])
        counted = F.pad(counted, _flat(pads), value=0.0 if excludes else 1.0)
        share = pool(F.pad(counted, _flat(beyond)), kernel, strides)
        return pool(F.pad(F.pad(x, _flat(pads)), _flat(beyond)), kernel, strides) / share

    return average


@rule("AdaptiveAvgPool", "AdaptiveMaxPool")
def _adaptive(node: ov.Node) -> Function:
    is_average = node.get_type_name() == "AdaptiveAvgPool"

    def pool(x: Any, sizes: Any) -> Any:
        for axis, size in enumerate(whole(sizes), start=2):
            length = x.shape[axis]
            bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
            parts = [x.narrow(axis, low, high - low) for low, high in bounds]
            x = torch.cat([p.mean(axis, True) if is_average else p.amax(axis, True) for p in parts], axis)
        return x

    return pool


# --------------------------------------------------------------------------- attention


@rule("ScaledDotProductAttention")
def _attention(node: ov.Node) -> Function:
    causal = bool(node.get_attributes()["causal"])

    def attend(query: Any, key: Any, value: Any, mask: Any = None, scale: Any = None) -> Any:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query * factor) @ key.transpose(-1, -2)
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        elif mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ value

    return attend
