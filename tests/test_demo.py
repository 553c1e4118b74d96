"""The demo that ships with the package is real: its model reads its images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest

from vinoopt import serde
from vinoopt.demo import DemoFiles, demo_files
from vinoopt.records import PreprocessSpec

WIDE = Path(__file__).parent / "data" / "digits_wide.onnx"


@pytest.fixture(scope="module")
def demo() -> DemoFiles:
    return demo_files()


@pytest.fixture(scope="module")
def data(demo: DemoFiles) -> Iterator[dict[str, np.ndarray]]:
    with np.load(demo.data) as arrays:
        yield {name: arrays[name] for name in arrays.files}


def test_the_images_are_held_out_digits_of_all_classes(data: dict[str, np.ndarray]) -> None:
    assert data["images"].shape == (899, 32, 32, 1)
    assert data["images"].dtype == np.uint8
    assert data["images"].max() == 255
    assert np.bincount(data["labels"], minlength=10).min() >= 85


def test_the_float_model_reads_the_images(demo: DemoFiles, data: dict[str, np.ndarray]) -> None:
    spec = serde.from_mapping(PreprocessSpec, serde.read_toml(demo.preprocess), where="preprocess.toml")
    pixels = data["images"].transpose(0, 3, 1, 2).astype(np.float32)
    images = (pixels - np.float32(spec.mean[0])) / np.float32(spec.scale[0])
    compiled = ov.Core().compile_model(demo.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    guesses = compiled({spec.input: images})[0].argmax(1)

    # 98.9% when it was trained; two images of room for other instruction sets.
    assert (guesses == data["labels"]).sum() >= 887


@pytest.mark.parametrize("name", ["demo", "wide"])
def test_the_networks_have_plain_names_and_a_free_batch(name: str, demo: DemoFiles) -> None:
    path = demo.model if name == "demo" else WIDE
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)

    names = [node.name for node in model.graph.node]
    assert "blocks.3.conv2" in names
    assert len(set(names)) == len(names)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.graph.input[0].name == "images"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert path.stat().st_size < 1_400_000
