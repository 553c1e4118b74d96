"""Layers that the NPU compiler stumbles over, in another form that computes exactly the same.

Found by cutting refused networks down with the compiler of OpenVINO 2026.4 for platforms 3720, 4000 and 5010:
it merges channels of zeros into the padding of the convolution behind them and then finds too few channels
(all platforms, float and INT8), and for 3720 it places quantized channels at addresses that are not multiples
of 16 bytes. A 1x1 convolution that copies channels has neither problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from vinoopt.records import Diagnostic

VERSION = 1
"""To be raised with every change here: kept estimates are of the rewritten network."""

_RANK = 4
_CHANNELS = 1
_ALIGNMENT = 16
_MISALIGNS = frozenset({"3720"})
_MISPLACED = "Base address not aligned"
"""The compiler's words."""
_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
# Layers that NNCF puts no quantizer behind: what comes out of them is as quantized as what went in.
_PASSING = frozenset({"MaxPool", "Slice", "StridedSlice"})
_DEPTH = 8


def rewrite(model: ov.Model, platform: str) -> tuple[Diagnostic, ...]:
    """Replace such layers of `model` in place; one diagnostic for each, none where nothing was changed."""
    found = [node for node in model.get_ordered_ops() if _pads_channels(node)]
    return tuple(diagnostic for node in found for diagnostic in _replaced(node, platform))


def rewrite_file(ir: Path, platform: str) -> tuple[Diagnostic, ...]:
    """The same in an IR file, which stays as it is where nothing has to be replaced."""
    model = ov.Core().read_model(ir)
    found = rewrite(model, platform)
    if found:
        part = ir.with_name("rewritten.xml")
        ov.save_model(model, part, compress_to_fp16=False)
        del model  # it may still map the weights' file
        for suffix in (".bin", ".xml"):
            part.with_suffix(suffix).replace(ir.with_suffix(suffix))
    return found


def explained(model: ov.Model, refusal: str) -> str:
    """A refusal of the compiler, with the layers that it is about where the compiler's words do not name them."""
    if _MISPLACED not in refusal:
        return refusal
    names = [node.get_friendly_name() for node in model.get_ordered_ops() if _joins_at_odd_channel(node)]
    if not names:
        return refusal
    return (
        f"{refusal} (quantized channels are placed at multiples of {_ALIGNMENT} only, and these layers place some "
        f"elsewhere: {', '.join(names)}; keep them in float with --ignored-scope, or change their channels)"
    )


def _joins_at_odd_channel(node: ov.Node) -> bool:
    """Whether a layer puts something behind a number of channels that is not a multiple of the alignment."""
    kind = node.get_type_name()
    if kind == "Pad":
        begins = _values(node, 1)
        return begins is not None and len(begins) > _CHANNELS and begins[_CHANNELS] % _ALIGNMENT != 0
    if kind != "Concat" or node.get_attributes().get("axis") != _CHANNELS:
        return False
    shapes = [value.get_partial_shape() for value in node.input_values()]
    if any(len(shape) <= _CHANNELS or shape[_CHANNELS].is_dynamic for shape in shapes):
        return False
    starts = np.cumsum([shape[_CHANNELS].get_length() for shape in shapes])[:-1]
    return bool((starts % _ALIGNMENT).any())


def _pads_channels(node: ov.Node) -> bool:
    """Whether a layer adds channels of zeros to a picture and does nothing else."""
    if node.get_type_name() != "Pad" or node.get_attributes().get("pad_mode") != "constant":
        return False
    if node.get_output_partial_shape(0).is_dynamic or len(node.get_output_shape(0)) != _RANK:
        return False
    begins, ends = (_values(node, port) for port in (1, 2))
    if begins is None or ends is None or (begins < 0).any() or (ends < 0).any():
        return False
    value = _values(node, 3) if node.get_input_size() > 3 else np.zeros(1)
    grows = np.flatnonzero(begins + ends)
    return value is not None and not value.any() and grows.tolist() == [_CHANNELS]


def _values(node: ov.Node, port: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    source = node.input_value(port).get_node()
    if source.get_type_name() != "Constant":
        return None
    return np.asarray(source.get_data(), dtype=np.float64).reshape(-1)


def _replaced(node: ov.Node, platform: str) -> Iterator[Diagnostic]:
    quantizer = _quantizer(node.input_value(0).get_node())
    first = int(node.input_value(1).get_node().get_data().reshape(-1)[_CHANNELS])
    reason = ""
    if any(edge.get_node().get_type_name() in _CONVOLUTIONS for edge in node.output(0).get_target_inputs()):
        reason = "the NPU compiler loses channels of zeros in front of a convolution"
    elif platform in _MISALIGNS and quantizer is not None and first % _ALIGNMENT:
        reason = f"NPU {platform} cannot place quantized channels behind {first} others"
    if not reason:
        return
    name = node.get_friendly_name()
    _copy_channels(node, quantizer, first)
    yield Diagnostic(
        severity="info",
        code="NPU_REWRITTEN",
        message=f'"{name}" adds channels of zeros, compiled as a 1x1 convolution with the same result: {reason}',
        layer=name,
    )


def _quantizer(node: ov.Node) -> ov.Node | None:
    """The FakeQuantize that a tensor comes from."""
    for _ in range(_DEPTH):
        if node.get_type_name() == "FakeQuantize":
            return node
        if node.get_type_name() not in _PASSING:
            return None
        node = node.input_value(0).get_node()
    return None


def _copy_channels(node: ov.Node, quantizer: ov.Node | None, first: int) -> None:
    """Put a 1x1 convolution in the place of a Pad: channel `first` + i is channel i, all others are zero."""
    data = node.input_value(0)
    copied = data.get_shape()[_CHANNELS]
    kernel = np.zeros((node.get_output_shape(0)[_CHANNELS], copied, 1, 1), np.float32)
    kernel[first + np.arange(copied), np.arange(copied)] = 1
    weights = ops.constant(kernel)
    if data.get_element_type() != ov.Type.f32:
        weights = ops.convert(weights, data.get_element_type().get_type_name())
    if quantizer is not None:
        one = np.float32(1)
        weights = ops.fake_quantize(weights, -one, one, -one, one, 255)
    new = ops.convolution(data, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    new.set_friendly_name(node.get_friendly_name())
    if quantizer is not None:  # every copied value lies on the quantizer's grid, and so does zero
        levels = int(quantizer.get_attributes()["levels"])
        new = ops.fake_quantize(new, *quantizer.input_values()[1:], levels=levels)
        new.set_friendly_name(f"{node.get_friendly_name()}/fq_output_0")
    names = node.output(0).get_names()
    node.output(0).replace(new.output(0))
    new.output(0).get_tensor().set_names(names)
