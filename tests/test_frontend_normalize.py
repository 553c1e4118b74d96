from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from vinoopt.errors import ModelError, VinooptError
from vinoopt.frontend.normalize import load_model
from vinoopt.frontend.parity import check_parity, random_samples

HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '


def save(tmp_path: Path, model: str | onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = tmp_path / name
    proto = parser.parse_model(HEAD + model) if isinstance(model, str) else model
    path.write_bytes(proto.SerializeToString())
    return path


def kinds(model: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def run(model: ov.Model, *values: NDArray[Any]) -> list[NDArray[Any]]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(list(values))
    return [np.array(results[port]) for port in compiled.outputs]


def conv_bn(tmp_path: Path, dtype: type[np.floating[Any]] = np.float32) -> Path:
    """Conv, BatchNormalization, Relu with random weights."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)),
        "s": rng.uniform(0.5, 2, 4),
        "b": rng.standard_normal(4),
        "m": rng.standard_normal(4),
        "v": rng.uniform(0.5, 2, 4),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["N", 4, 8, 8])],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return save(tmp_path, proto)


def test_batch_norms_are_folded_and_the_result_stays(tmp_path: Path) -> None:
    path = conv_bn(tmp_path)
    source = load_model(path)
    assert "BatchNormInference" not in kinds(source.model)
    assert kinds(source.model)["Multiply"] == 0
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    want = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    # Folding multiplies the weights once more; sums of 27 terms in another order.
    np.testing.assert_allclose(run(source.model, x)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_computed_in_float32_behind_the_same_door(
    tmp_path: Path, dtype: type[np.floating[Any]]
) -> None:
    path = conv_bn(tmp_path, dtype)
    source = load_model(path)
    name = np.dtype(dtype).name
    assert source.inputs[0].dtype == source.outputs[0].dtype == name
    assert any(name in message for message in source.messages)
    inside = {
        node.get_output_element_type(0).get_type_name()
        for node in source.model.get_ops()
        if node.get_type_name() in ("Convolution", "Add", "Relu")
    }
    assert inside == {"f32"}
    weights = [node for node in source.model.get_ops() if node.get_type_name() == "Convolution"]
    assert weights[0].input_value(1).get_node().get_type_name() == "Constant"
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(dtype)
    got = run(source.model, x)[0]
    want = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    assert got.dtype == dtype
    # The reference rounds every step to float16 (11 bits); values are below 20.
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=2e-2 if dtype is np.float16 else 1e-4)


def test_half_weights_behind_a_cast_become_plain_constants(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float16).reshape(4, 3), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("Gemm", ["x", "w32"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [weight],
    )
    source = load_model(save(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))
    assert "Convert" not in kinds(source.model)
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(source.model, x)[0], [[18, 22, 26]])


def test_type_attributes_follow_to_float32(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        "(float16 n) => (float16[K] y, float[K] z) {"
        " h = Constant<value_float = 0.5>() s = Cast<to: int = 10>(h)"
        " y = Range(s, n, s) z = Cast<to: int = 1>(y) }",
    )
    source = load_model(path)
    assert [spec.dtype for spec in source.outputs] == ["float16", "float32"]
    got = run(source.model, np.array(2, np.float16))
    np.testing.assert_array_equal(got[1], [0.5, 1.0, 1.5])


# --------------------------------------------------------------------------- names


def test_names_are_unique_and_the_same_in_every_process(tmp_path: Path) -> None:
    path = conv_bn(tmp_path)
    names = [node.get_friendly_name() for node in load_model(path).model.get_ordered_ops()]
    assert len(set(names)) == len(names)
    script = (
        "import sys; from pathlib import Path; from vinoopt.frontend.normalize import load_model\n"
        "load_model(sys.argv[1])\n"
        "print('\\n'.join(n.get_friendly_name() for n in load_model(sys.argv[1]).model.get_ordered_ops()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert told.stdout.split() == names


def test_nodes_keep_their_onnx_names(tmp_path: Path) -> None:
    names = {node.get_friendly_name() for node in load_model(conv_bn(tmp_path)).model.get_ops()}
    assert {"x", "y", "y/result"} <= names


def test_duplicate_and_empty_node_names(tmp_path: Path) -> None:
    proto = parser.parse_model(HEAD + "(float[4] x) => (float[4] y) { a = Neg(x) b = Abs(a) y = Relu(b) }")
    for node, name in zip(proto.graph.node, ("same", "same", ""), strict=True):
        node.name = name
    names = [node.get_friendly_name() for node in load_model(save(tmp_path, proto)).model.get_ops()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "word", ["a,b", "x:0", "with space", "ä/ß", "[1]", "<q>&\"'", "a\nb", "C:\\x", "..", "1"]
)
def test_names_with_odd_characters_survive_the_ir(tmp_path: Path, word: str) -> None:
    proto = parser.parse_model(HEAD + "(float[4] x) => (float[4] y) { y = Relu(x) }")
    for value, name in ((proto.graph.input[0], f"in{word}"), (proto.graph.output[0], f"out{word}")):
        value.name = name
    proto.graph.node[0].input[0], proto.graph.node[0].output[0] = f"in{word}", f"out{word}"
    source = load_model(save(tmp_path, proto))
    assert (source.inputs[0].name, source.outputs[0].name) == (f"in{word}", f"out{word}")
    ov.save_model(source.model, str(tmp_path / "m.xml"))
    again = ov.Core().read_model(str(tmp_path / "m.xml"))
    assert again.input(0).get_names() == {f"in{word}"} and again.output(0).get_names() == {f"out{word}"}
    assert {n.get_friendly_name() for n in again.get_ops()} == {
        n.get_friendly_name() for n in source.model.get_ops()
    }


# --------------------------------------------------------------------------- odd graphs

ODD = {
    "an output that is an input": "(float[4] x, float[4] z) => (float[4] x, float[4] y) { y = Relu(z) }",
    "an output behind Identity": "(float[4] x) => (float[4] y, float[4] z) { y = Identity(x) z = Relu(x) }",
    "one tensor, two outputs": "(float[4] x) => (float[4] a, float[4] b) { a = Relu(x) b = Identity(a) }",
    "a weight as output": "(float[2] x) => (float[2] a, float[2] w) <float[2] w = {1., 2.}> { a = Add(x, w) }",
    "no input": "() => (float[2] a) { a = Constant<value = float[2] {1., 2.}>() }",
    "an unused input": "(float[4] x, float[2] u) => (float[4] a) { a = Relu(x) }",
    "scalars": "(float x, int64 i) => (float y) { c = Cast<to: int = 1>(i) y = Add(x, c) }",
    "booleans": "(bool[4] c, float[4] a) => (float[4] y) { b = Neg(a) y = Where(c, a, b) }",
    "int64 indices": "(int64[2] i) => (float[2, 2] y) <float[2, 2] w = {1., 2., 3., 4.}> { y = Gather(w, i) }",
    "bytes": "(uint8[4] i) => (uint8[4] y) { y = Add(i, i) }",
    "no elements": "(float[0, 3] x) => (float[0, 3] y) { y = Relu(x) }",
    "top k": "(float[2, 9] b) => (float[2, 3] v, int64[2, 3] i) <int64[1] k = {3}> { v, i = TopK(b, k) }",
    "data-dependent size": "(float[4] x) => (int64[1, N] y) { y = NonZero(x) }",
    "non-maximum suppression": "(float[1, 9, 4] b, float[1, 2, 9] s) => (int64[N, 3] y)"
    " <int64[1] m = {3}, float[1] i = {0.5}, float[1] t = {0.1}> { y = NonMaxSuppression(b, s, m, i, t) }",
    "If": "(bool c, float[4] x) => (float[4] y) { y = If (c) <then_branch = t () => (float[4] a)"
    " { a = Relu(x) }, else_branch = e () => (float[4] b) { q = Neg(x) b = Relu(q) }> }",
    "Loop": "(int64 n, float[4] x) => (float[4] y) <bool c = {1}> { y = Loop(n, c, x) <body = b"
    " (int64 i, bool cc, float[4] v) => (bool co, float[4] w) { co = Identity(cc) w = Add(v, v) }> }",
    "half precision in an If": "(bool c, float16[4] x) => (float16[4] y) { y = If (c) <then_branch = t ()"
    " => (float16[4] a) { a = Relu(x) }, else_branch = e () => (float16[4] b) { b = Neg(x) }> }",
    "nodes out of order": "(float[4] x) => (float[4] y) { y = Relu(t) t = Neg(x) }",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_odd_graphs_are_read_as_they_are(tmp_path: Path, text: str) -> None:
    proto = parser.parse_model(HEAD + text)
    source = load_model(save(tmp_path, proto))
    assert [spec.name for spec in source.outputs] == [value.name for value in proto.graph.output]
    for port, spec in zip(source.model.outputs, source.outputs, strict=True):
        assert spec.name in port.get_names()
    names = [node.get_friendly_name() for node in source.model.get_ops()]
    assert len(set(names)) == len(names)
    evaluator = ReferenceEvaluator(reordered(proto))
    for sample in random_samples(source, 3):
        got = run(source.model, *(sample[spec.name] for spec in source.inputs))
        for mine, want in zip(got, evaluator.run(None, dict(sample)), strict=True):
            np.testing.assert_allclose(mine, want, rtol=1e-6)


def reordered(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The reference evaluator runs nodes in the order of the file."""
    if [node.op_type for node in proto.graph.node] != ["Relu", "Neg"]:
        return proto
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "loc" : 1]>'
        "g (float[4] x) => (float[4] y) { t = loc.f(x) y = loc.f(t) }"
        '<domain: "loc", opset_import: ["" : 18]> f (a) => (b) { c = Relu(a) b = Add(c, a) }'
    )
    source = load_model(save(tmp_path, proto))
    np.testing.assert_array_equal(run(source.model, np.array([1, -1, 2, -2], np.float32))[0], [4, -1, 8, -2])


def test_local_functions_with_external_weights(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "loc" : 1]>'
        "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = loc.f(x, w) }"
        '<domain: "loc", opset_import: ["" : 18]> f (a, b) => (c) { c = Add(a, b) }'
    )
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(proto, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").exists()
    np.testing.assert_array_equal(run(load_model(path).model, np.zeros(2, np.float32))[0], [1, 2])


def test_operators_that_openvino_lacks_are_written_out_in_simpler_ones(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x, int64[2] t) => (float l)'
        ' { l = NegativeLogLikelihoodLoss<reduction = "sum">(x, t) }'
    )
    x, t = np.array([[0.5, 1, 2], [3, 4, 5]], np.float32), np.array([2, 0])
    np.testing.assert_allclose(run(load_model(save(tmp_path, proto)).model, x, t)[0], -5.0)


def test_an_input_without_elements_stays_an_input(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        "(float[4] x, float16[0] like, float[4] z) => (float16[4] y) { s = Add(x, z) y = CastLike(s, like) }",
    )
    source = load_model(path)
    assert [(spec.name, spec.shape) for spec in source.inputs] == [("x", (4,)), ("like", (0,)), ("z", (4,))]
    report = check_parity(source, random_samples(source, 1))
    assert report.ok, report.reason


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [5.0, 6.0])
    places = helper.make_tensor("i", TensorProto.INT64, [2, 2], [0, 1, 1, 0])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        sparse_initializer=[helper.make_sparse_tensor(values, places, [2, 2])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source = load_model(save(tmp_path, proto))
    np.testing.assert_array_equal(run(source.model, np.zeros((2, 2), np.float32))[0], [[0, 5], [6, 0]])


@pytest.mark.parametrize(
    "body",
    [
        "(float[4] x) => (float[4] y) { y = Relu(t) }",
        "(float[4] x) => (float[4] y) { y = Relu(x) y = Neg(x) }",
        "(float[4] x) => (float[4] y) { t = Relu(y) y = Neg(t) }",
        "(float[4] x) => (float[4] z) { y = Neg(x) }",
        "(float[4] x, float[4] x) => (float[4] y) { y = Neg(x) }",
        "(float[1,3,8,8] x, float[2,4,3,3] w) => (float[N] y) { y = Conv(x, w) }",
    ],
)
def test_broken_graphs_are_refused_in_one_sentence(tmp_path: Path, body: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(save(tmp_path, body))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- kinds of models


def attention(*, scale: bool, norm: bool, both_active: bool = True) -> str:
    """One attention head over (1, 8, 16), by its operators."""
    keys = "k" if both_active else "c"
    steps = ["k = Transpose<perm = [0, 2, 1]>(x)", f"p = MatMul(x, {keys})"]
    steps.append("q = Mul(p, s)" if scale else "q = Identity(p)")
    steps.append("a = Softmax<axis = -1>(q)")
    steps.append("o = MatMul(a, x)" if both_active else "o = Relu(a)")
    steps.append("y = LayerNormalization(o, g, b)" if norm and both_active else "y = Relu(o)")
    ones = ", ".join(["1.0"] * 16)
    weights = f"float s = {{0.25}}, float[16] g = {{{ones}}}, float[16] b = {{{ones}}}"
    if not both_active:
        weights += f", float[16, 16] c = {{{', '.join(['0.5'] * 256)}}}"
    return f"(float[1, 8, 16] x) => (float[1, 8, 16] y) <{weights}> {{ {' '.join(steps)} }}"


@pytest.mark.parametrize("scale", [True, False])
def test_transformers_are_recognised_by_their_graph(tmp_path: Path, scale: bool) -> None:
    assert load_model(save(tmp_path, attention(scale=scale, norm=True))).is_transformer


def test_attention_that_is_not_fused_is_recognised_by_its_softmax(tmp_path: Path) -> None:
    text = (
        attention(scale=True, norm=True)
        .replace("a = Softmax", "t = Clip(q, n, m) a = Softmax")
        .replace(">(q)", ">(t)")
    )
    source = load_model(
        save(tmp_path, text.replace("<float s", "<float n = {-9.0}, float m = {9.0}, float s"))
    )
    assert "ScaledDotProductAttention" not in kinds(source.model)
    assert source.is_transformer


def test_softmax_between_other_things_is_no_transformer(tmp_path: Path) -> None:
    assert not load_model(save(tmp_path, attention(scale=True, norm=False))).is_transformer
    assert not load_model(save(tmp_path, attention(scale=True, norm=True, both_active=False))).is_transformer


def test_quantized_models_keep_their_fake_quantizers(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        "(float[1, 4] x) => (float[1, 4] y) <float s = {0.1}, uint8 z = {128}>"
        " { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }",
    )
    source = load_model(path)
    assert source.quantized and kinds(source.model)["FakeQuantize"] == 1
    x = np.array([[0.04, 0.06, 0.31, 99.0]], np.float32)
    np.testing.assert_allclose(run(source.model, x)[0], [[0.0, 0.1, 0.3, 12.7]], rtol=1e-5)


# --------------------------------------------------------------------------- real models

REAL = {
    "cifar10_resnet32_akamaster_op11": None,
    "cifar_resnet20": None,
    "dtln_1": None,
    "dtln_2": None,
    "external_data_resnet/model": None,
    "magika_standard_v2_1": None,
    "mnist_cntk": None,
    "mobilenetv2_1.0_224_qat_qdq_u8": None,
    "mobilenetv2_1.0_224_qatdeq": None,
    "ppocr_cls": "[1,3,48,192]",
    "silero_vad_openvino_16k": None,
    "squeezenet1.0_fp16": None,
    "squeezenet1.0_fp32": None,
    "tiny_vww96_mlperf": None,
    "ultraface_rfb_320": None,
    "yolox_nano": None,
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_say_the_same_as_their_files(shared: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    source = load_model(shared / "models" / f"{name}.onnx", shape=REAL[name])
    report = check_parity(source, random_samples(source, 2))
    assert report.checked and report.ok, report.reason
    assert bool(source.quantized) == ("qdq" in name)
    assert not source.is_transformer


@pytest.mark.slow
def test_every_operator_of_onnx_ends_in_a_model_or_a_clear_error(tmp_path: Path) -> None:
    from onnx.backend.test.case.node import collect_testcases

    states: Counter[str] = Counter()
    for case in collect_testcases(None)[::4]:
        try:
            source = load_model(save(tmp_path, case.model))
            names = [node.get_friendly_name() for node in source.model.get_ops()]
            assert len(set(names)) == len(names), case.name
            states["loaded"] += 1
        except VinooptError as exc:
            assert "\n" not in str(exc), case.name
            states["refused"] += 1
    assert states["loaded"] > 3 * states["refused"] > 0
