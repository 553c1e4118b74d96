from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import parser
from openvino import opset13 as ops

from vinoopt.errors import DataError
from vinoopt.frontend import parity
from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.frontend.parity import check_parity, random_samples
from vinoopt.records import PreprocessSpec

pytest.importorskip("onnxruntime")


def save(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g ' + text).SerializeToString()
    )
    return path


CONV = """(float[1,3,8,8] x) => (float[1,2,4,4] y, float[1,2,4,4] z) {
    w = Constant<value = float[2,3,1,1] {1., -2., 3., 0.5, 0.25, -1.}>()
    c = Conv<strides = [2, 2]>(x, w)
    y = Relu(c)
    z = Sigmoid(c)
}"""


def with_model(source: SourceModel, model: ov.Model) -> SourceModel:
    return dataclasses.replace(source, model=model)


def test_equal_models_pass_with_their_errors_told(tmp_path: Path) -> None:
    source = load_model(save(tmp_path, CONV))
    report = check_parity(source, random_samples(source, 3))
    assert report.checked and report.ok and report.reason == "" and report.samples == 3
    assert [each.name for each in report.outputs] == ["y", "z"]
    assert all(each.max_rel_error < 1e-5 for each in report.outputs)


def test_the_output_that_differs_is_named(tmp_path: Path) -> None:
    source = load_model(save(tmp_path, CONV))
    port = source.model.output(1).get_node().input_value(0)
    shifted = ops.add(port, np.float32(0.25))
    source.model.output(1).get_node().input(0).replace_source_output(shifted.output(0))
    source.model.validate_nodes_and_infer_types()
    report = check_parity(source, random_samples(source, 2))
    assert report.checked and not report.ok
    assert [each.ok for each in report.outputs] == [True, False]
    assert '"z" differs by' in report.reason
    assert report.outputs[1].max_abs_error == pytest.approx(0.25, abs=1e-4)


def test_another_shape_is_told(tmp_path: Path) -> None:
    source = load_model(save(tmp_path, "(float[2,3] x) => (float[2,3] y) { y = Relu(x) }"))
    x = ops.parameter([2, 3], np.float32, name="x")
    report = check_parity(
        with_model(source, ov.Model([ops.reshape(x, [3, 2], False)], [x])), random_samples(source, 1)
    )
    assert not report.ok and "shape [3, 2] instead of [2, 3]" in report.reason


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    source = load_model(save(tmp_path, "(float[2] x) => (float[2] y) { y = Relu(x) }"))
    x = ops.parameter([2], np.float32, name="x")
    report = check_parity(
        with_model(source, ov.Model([ops.divide(x, np.float32(0))], [x])), random_samples(source, 1)
    )
    assert not report.ok and "not finite" in report.reason


def test_integer_outputs_are_compared_by_share(tmp_path: Path) -> None:
    source = load_model(
        save(tmp_path, "(float[4,9] x) => (int64[4] i) { i = ArgMax<axis = 1, keepdims = 0>(x) }")
    )
    report = check_parity(source, random_samples(source, 2))
    assert report.ok and report.outputs[0].max_rel_error == 0


@pytest.mark.parametrize(
    "spec",
    [
        PreprocessSpec(),
        PreprocessSpec(colour_order="BGR", mean=(104.0, 117.0, 123.0), scale=(57.0, 58.0, 59.0)),
        PreprocessSpec(colour_order="BGR", mean=(127.0,), image_size=(13, 11)),
        PreprocessSpec(image_size=(5, 4), resize="cubic"),
        PreprocessSpec(image_size=(16, 16), resize="nearest", scale=(255.0,)),
        PreprocessSpec(image_layout="NCHW", mean=(1.0, 2.0, 3.0)),
    ],
    ids=str,
)
def test_embedded_preprocessing_is_checked_too(tmp_path: Path, spec: PreprocessSpec) -> None:
    source = load_model(save(tmp_path, CONV), preprocess=[spec])
    report = check_parity(source, random_samples(source, 2))
    assert report.checked and report.ok, report.reason


def test_a_wrong_colour_order_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, CONV)
    right = load_model(path, preprocess=[PreprocessSpec(colour_order="BGR")])
    wrong = load_model(path, preprocess=[PreprocessSpec(colour_order="RGB")])
    report = check_parity(with_model(right, wrong.model), random_samples(right, 2))
    assert report.checked and not report.ok


def test_random_numbers_in_the_model_are_not_compared(tmp_path: Path) -> None:
    source = load_model(
        save(tmp_path, "(float[4] x) => (float[4] y) { r = RandomNormalLike(x) y = Add(x, r) }")
    )
    report = check_parity(source, random_samples(source, 1))
    assert not report.checked and "random" in report.reason


def test_without_onnxruntime_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_model(save(tmp_path, CONV))
    monkeypatch.setattr(parity, "onnxruntime", None)
    report = check_parity(source, random_samples(source, 1))
    assert not report.checked and report.reason == "not checked: pip install vinoopt[parity]"


def test_what_onnxruntime_refuses_is_not_checked(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { t = Relu(x) y = Neg(t) }'
    )
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    path = tmp_path / "m.onnx"
    onnx.save(proto, str(path))
    source = load_model(path)
    report = check_parity(source, random_samples(source, 1))
    assert not report.checked and "same" in report.reason and "\n" not in report.reason


def test_samples_must_fit_the_inputs(tmp_path: Path) -> None:
    source = load_model(save(tmp_path, CONV))
    with pytest.raises(DataError, match="'z'"):
        check_parity(source, [{"z": np.zeros(1)}])
    with pytest.raises(DataError, match="no samples"):
        check_parity(source, [])


def test_random_samples_fit_and_repeat(tmp_path: Path) -> None:
    text = "(float[N,3] x, int64[K] i, bool b) => (float[M,3] y) { y = Relu(x) j = Neg(i) c = Not(b) }"
    source = load_model(save(tmp_path, text), shape="x[4..8,3]")
    first, again = random_samples(source, 2, seed=3), random_samples(source, 2, seed=3)
    assert {k: (v.shape, v.dtype.name) for k, v in first[0].items()} == {
        "x": ((4, 3), "float32"),
        "i": ((2,), "int64"),
        "b": ((), "bool"),
    }
    for one, other in zip(first, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
