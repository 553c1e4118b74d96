from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import parser
from PIL import Image

from vinoopt.errors import PreprocessError
from vinoopt.frontend.normalize import load_model
from vinoopt.frontend.preprocess import read_preprocess
from vinoopt.records import PreprocessSpec, TensorSpec

MEAN, SCALE = (104.0, 117.0, 123.0), (57.0, 58.0, 59.0)


def identity(tmp_path: Path, shape: str = "1,3,6,5", kind: str = "float") -> Path:
    path = tmp_path / "m.onnx"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{ y = Neg(x) }}'
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path


def run(path: Path, spec: PreprocessSpec, image: NDArray[Any], shape: str | None = None) -> NDArray[Any]:
    """What reaches the model's own input."""
    source = load_model(path, shape=shape, preprocess=[spec])
    compiled = ov.Core().compile_model(source.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return -np.array(compiled([image])[0])


def image(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_rgb_image_to_float_nchw(tmp_path: Path) -> None:
    pixels = image(1, 6, 5, 3)
    got = run(identity(tmp_path), PreprocessSpec(), pixels)
    np.testing.assert_array_equal(got, pixels.transpose(0, 3, 1, 2).astype(np.float32))


def test_the_user_feeds_bytes_in_the_image_layout(tmp_path: Path) -> None:
    source = load_model(identity(tmp_path, "N,3,6,5"), preprocess=[PreprocessSpec()])
    assert source.inputs == (TensorSpec(name="x", shape=("?", 6, 5, 3), dtype="uint8", layout="NHWC"),)
    assert source.model_inputs[0].shape == ("?", 3, 6, 5)


@pytest.mark.parametrize("colour_order", ["RGB", "BGR"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_mean_and_scale_are_in_the_models_colour_order(tmp_path: Path, colour_order: str, kind: str) -> None:
    pixels = image(1, 6, 5, 3)
    spec = PreprocessSpec(colour_order=colour_order, mean=MEAN, scale=SCALE)
    got = run(identity(tmp_path, kind=kind), spec, pixels)
    ordered = pixels[..., ::-1] if colour_order == "BGR" else pixels
    want = ((ordered.astype(np.float32) - np.float32(MEAN)) / np.float32(SCALE)).transpose(0, 3, 1, 2)
    # Dividing by a scale may become a multiplication by its inverse: one more rounding. float16 rounds at the
    # output, to 11 bits.
    np.testing.assert_allclose(got, want, rtol=1e-3 if kind == "float16" else 1e-6, atol=1e-6)


def test_one_value_serves_all_channels(tmp_path: Path) -> None:
    pixels = image(1, 6, 5, 3)
    got = run(identity(tmp_path), PreprocessSpec(mean=(127.5,), scale=(127.5,)), pixels)
    want = (pixels.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_grey_image(tmp_path: Path) -> None:
    pixels = image(2, 6, 5, 1)
    got = run(identity(tmp_path, "N,1,6,5"), PreprocessSpec(scale=(255.0,)), pixels)
    np.testing.assert_allclose(got, pixels.transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)


def test_model_that_wants_images_as_they_are_fed(tmp_path: Path) -> None:
    pixels = image(1, 6, 5, 3)
    spec = PreprocessSpec(model_layout="NHWC", colour_order="BGR", mean=MEAN)
    got = run(identity(tmp_path, "1,6,5,3"), spec, pixels)
    np.testing.assert_allclose(got, pixels[..., ::-1].astype(np.float32) - np.float32(MEAN), rtol=1e-6)


@pytest.mark.parametrize("size", [(12, 10), (9, 7), (3, 4)])
def test_linear_resize_against_numpy(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = image(1, *size, 3)
    spec = PreprocessSpec(image_size=size, colour_order="BGR", mean=MEAN, scale=SCALE)
    resized = bilinear(pixels[0].astype(np.float32), 6, 5)[None, ..., ::-1]
    want = ((resized - np.float32(MEAN)) / np.float32(SCALE)).transpose(0, 3, 1, 2)
    # Weights of the interpolation are rounded to float32 on both sides; values go up to 255 / 57.
    np.testing.assert_allclose(run(identity(tmp_path), spec, pixels), want, atol=1e-4)


def bilinear(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Half-pixel centres, edges repeated, no antialiasing."""

    def along(values: NDArray[Any], count: int) -> NDArray[Any]:
        where = np.clip((np.arange(count) + 0.5) * len(values) / count - 0.5, 0, len(values) - 1)
        low = np.floor(where).astype(int)
        part = (where - low)[:, None, None]
        return values[low] * (1 - part) + values[np.minimum(low + 1, len(values) - 1)] * part

    return along(along(pixels, height).swapaxes(0, 1), width).swapaxes(0, 1)


def test_linear_enlargement_is_that_of_pillow(tmp_path: Path) -> None:
    pixels = image(1, 3, 3, 3)
    got = run(identity(tmp_path), PreprocessSpec(image_size=(3, 3)), pixels)
    want = np.asarray(Image.fromarray(pixels[0]).resize((5, 6), Image.Resampling.BILINEAR))
    # Pillow rounds to whole values after each of its two passes; shrinking is not compared, since it antialiases.
    np.testing.assert_allclose(got[0].transpose(1, 2, 0), want, atol=1.01)


def test_shape_and_preprocessing_together(tmp_path: Path) -> None:
    pixels = image(1, 8, 8, 3)
    got = run(identity(tmp_path, "N,3,H,W"), PreprocessSpec(image_size=(8, 8)), pixels, shape="x[1,3,4,4]")
    assert got.shape == (1, 3, 4, 4)


def test_preprocessing_of_one_input_leaves_the_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[1,3,4,4] a, float[1,3,4,4] b) => (float[1,3,4,4] y) { y = Sub(a, b) }
    """
    path.write_bytes(parser.parse_model(text).SerializeToString())
    source = load_model(path, preprocess=[PreprocessSpec(input="b", scale=(2.0,))])
    assert [(s.name, s.dtype, s.layout) for s in source.inputs] == [
        ("a", "float32", None),
        ("b", "uint8", "NHWC"),
    ]


@pytest.mark.parametrize(
    ("spec", "shape", "said"),
    [
        (PreprocessSpec(), "1,10", "does not fit the layout NCHW"),
        (PreprocessSpec(), "1,6,5,3", "channel dimension"),
        (PreprocessSpec(input="y"), "1,3,6,5", 'no input "y"'),
        (PreprocessSpec(colour_order="GBR"), "1,3,6,5", 'colour_order "GBR"'),
        (PreprocessSpec(colour_order="BGR"), "1,1,6,5", "needs 3 channels"),
        (PreprocessSpec(mean=(1.0, 2.0)), "1,3,6,5", "mean has 2 values for 3 channels"),
        (PreprocessSpec(scale=(1.0, 0.0, 1.0)), "1,3,6,5", "zero"),
        (PreprocessSpec(resize="area"), "1,3,6,5", 'resize "area"'),
        (PreprocessSpec(image_size=(0, 4)), "1,3,6,5", "not a height and width"),
        (PreprocessSpec(image_size=(8, 8)), "1,3,H,W", "--shape"),
        (PreprocessSpec(image_layout="NXWC"), "1,3,6,5", 'image_layout "NXWC"'),
        (PreprocessSpec(fit="stretch"), "1,3,6,5", 'fit "stretch"'),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, spec: PreprocessSpec, shape: str, said: str) -> None:
    with pytest.raises(PreprocessError, match=said):
        load_model(identity(tmp_path, shape), preprocess=[spec])


def test_integer_inputs_take_no_mean(tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match="takes int64"):
        load_model(identity(tmp_path, kind="int64"), preprocess=[PreprocessSpec(mean=(1.0,))])


def test_a_model_that_takes_bytes_itself(tmp_path: Path) -> None:
    pixels = image(1, 6, 5, 3)
    path = tmp_path / "m.onnx"
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (uint8[1,6,5,3] x) => (float[1,6,5,3] y) { f = Cast<to: int = 1>(x) y = Neg(f) }
    """
    path.write_bytes(parser.parse_model(text).SerializeToString())
    got = run(path, PreprocessSpec(model_layout="NHWC", colour_order="BGR"), pixels)
    np.testing.assert_array_equal(got, pixels[..., ::-1].astype(np.float32))


def test_reading_a_single_table(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('colour_order = "BGR"\nmean = [104, 117, 123]\nscale = 255\nimage_size = [256, 320]\n')
    assert read_preprocess(path) == (
        PreprocessSpec(colour_order="BGR", mean=(104.0, 117.0, 123.0), scale=(255.0,), image_size=(256, 320)),
    )


def test_reading_tables_for_several_inputs(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[[input]]\ninput = "a"\n[[input]]\ninput = "b"\nfit = "letterbox"\n')
    assert [(s.input, s.fit) for s in read_preprocess(path)] == [("a", "crop"), ("b", "letterbox")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('color_order = "BGR"', 'unknown key "color_order"; did you mean "colour_order"'),
        ('mean = "big"', "mean"),
        ("mean = [", "not valid TOML"),
        ('scale = 2\n[[input]]\ninput = "a"', "scale"),
    ],
)
def test_reading_is_strict(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(PreprocessError, match=said):
        read_preprocess(path)
