"""Layers in another form for the NPU compiler: what they compute stays what it was, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.toolchains.npu_rewrites import explained, rewrite, rewrite_file

SIZE, CHANNELS = 6, 16
RANGES = {"u8": (0.0, 4.0, 256), "i8": (-4.0, 3.96875, 256), "odd": (-0.37, 2.91, 256)}


def quantized(data: ov.Node | ov.Output, form: str) -> ov.Node:
    low, high, levels = RANGES[form]
    scale = (high - low) / (levels - 1)
    zero = round(-low / scale)  # NNCF's ranges hold zero exactly
    low, high = np.float32(-zero * scale), np.float32((levels - 1 - zero) * scale)
    return ops.fake_quantize(data, low, high, low, high, levels)


def padded(
    *, begin: int = 8, end: int = 8, form: str | None = "u8", to: str = "add", value: float = 0.0
) -> ov.Model:
    """A picture whose channels grow by zeros before an addition or a convolution."""
    generator = np.random.default_rng(1)
    picture = ops.parameter([1, CHANNELS, SIZE, SIZE], np.float32, name="x")
    data = picture if form is None else quantized(picture, form)
    data = ops.max_pool(data, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    pad = ops.pad(data, [0, begin, 0, 0], [0, end, 0, 0], "constant", np.float32(value))
    pad.set_friendly_name("shortcut")
    pad.output(0).get_tensor().set_names({"wider"})
    count = CHANNELS + begin + end
    if to == "add":
        last = ops.add(pad, generator.random((1, count, 1, 1)).astype(np.float32))
    else:
        kernel = generator.random((4, count, 3, 3)).astype(np.float32)
        last = ops.convolution(pad, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    return ov.Model([ops.result(last)], [picture], "padded")


def outputs(model: ov.Model) -> np.ndarray:
    picture = np.random.default_rng(0).normal(size=(1, CHANNELS, SIZE, SIZE)).astype(np.float32)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([picture])[0])


@pytest.mark.parametrize("form", [None, *RANGES])
@pytest.mark.parametrize(("begin", "end"), [(8, 8), (0, 5), (3, 0)])
def test_padded_channels_in_front_of_a_convolution_are_copied(form: str | None, begin: int, end: int) -> None:
    model = padded(begin=begin, end=end, form=form, to="convolution")
    before = outputs(model)
    (told,) = rewrite(model, "4000")
    assert (told.code, told.layer) == ("NPU_REWRITTEN", "shortcut")
    assert not [node for node in model.get_ops() if node.get_type_name() == "Pad"]
    assert any("wider" in port.get_names() for node in model.get_ops() for port in node.outputs())
    # The sum over channels runs in another order, nothing else differs.
    np.testing.assert_allclose(outputs(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", RANGES)
def test_quantized_channels_that_3720_cannot_place_are_copied(form: str) -> None:
    model = padded(form=form)
    before = outputs(model)
    assert rewrite(model, "3720")
    quantizers = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert len(quantizers) == 3  # the picture's, the kernel's, and the picture's again behind the copy
    np.testing.assert_allclose(outputs(model), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "platform"),
    [
        (padded(), "4000"),
        (padded(form=None), "3720"),
        (padded(begin=16, end=0), "3720"),
        (padded(begin=0), "3720"),
        (padded(value=1.0, to="convolution"), "3720"),
    ],
    ids=["other platform", "float", "multiple of 16", "behind", "not zeros"],
)
def test_what_compiles_is_left_alone(model: ov.Model, platform: str) -> None:
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert rewrite(model, platform) == ()
    assert [node.get_type_name() for node in model.get_ordered_ops()] == kinds


def test_file_is_replaced_by_one_that_computes_the_same_and_only_where_it_must(tmp_path: Path) -> None:
    ir = tmp_path / "model.xml"
    ov.save_model(padded(to="convolution"), ir, compress_to_fp16=False)
    before = outputs(ov.Core().read_model(ir))
    (told,) = rewrite_file(ir, "4000")
    assert told.layer == "shortcut"
    after = ov.Core().read_model(ir)
    assert "Pad" not in {node.get_type_name() for node in after.get_ops()}
    np.testing.assert_allclose(outputs(after), before, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    written = ir.read_bytes()
    assert rewrite_file(ir, "4000") == ()
    assert ir.read_bytes() == written


def test_border_of_a_picture_is_not_touched() -> None:
    picture = ops.parameter([1, CHANNELS, SIZE, SIZE], np.float32)
    pad = ops.pad(picture, [0, 0, 1, 1], [0, 1, 1, 1], "constant", np.float32(0))
    kernel = np.ones((4, CHANNELS + 1, 3, 3), np.float32)
    conv = ops.convolution(pad, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    assert rewrite(ov.Model([ops.result(conv)], [picture], "border"), "3720") == ()


def test_refusal_over_a_place_names_the_layers_that_it_is_about() -> None:
    picture = ops.parameter([1, CHANNELS, SIZE, SIZE], np.float32)
    zeros = ops.constant(np.zeros((1, 8, SIZE, SIZE), np.float32))
    odd = ops.concat([zeros, picture, zeros], 1)
    odd.set_friendly_name("odd")
    even = ops.concat([odd, picture], 1)
    even.set_friendly_name("even")
    model = ov.Model([ops.result(even)], [picture], "joined")
    words = "ConvertVPUMI37XX2ELF failed : Base address not aligned to 16B multiple."
    assert "place some elsewhere: odd; keep them in float" in explained(model, words)
    assert explained(model, "no such operator") == "no such operator"
    assert explained(padded(begin=0), words) == words
