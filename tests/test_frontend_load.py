from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from vinoopt.errors import ModelError, UnsupportedModelError
from vinoopt.frontend.load import ANY_RANK, load_onnx
from vinoopt.frontend.normalize import load_model

RELU = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, ?] x) => (float[N, 3, ?] y) { y = Relu(x) }
"""


def write(tmp_path: Path, text: str, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path


def write_proto(tmp_path: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(proto.SerializeToString())
    return path


def external_model(tmp_path: Path, location: str = "weights.bin", *, size: int = 16) -> Path:
    """y = x + w with w in an external file, whose location is written as given."""
    weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (tmp_path / "weights.bin").write_bytes(data[:size])
    return write_proto(tmp_path, proto)


def test_facts_of_a_small_model(tmp_path: Path) -> None:
    facts = load_onnx(write(tmp_path, RELU))
    assert (facts.ir_version, facts.opset, facts.quantized, facts.complaint) == (8, 17, "", "")
    assert [(s.name, s.shape, s.dtype) for s in facts.inputs] == [("x", ("?", 3, "?"), "float32")]
    assert [s.name for s in facts.outputs] == ["y"]
    assert facts.size_bytes == facts.path.stat().st_size


def test_initializers_listed_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    text = """
    <ir_version: 3, opset_import: ["" : 7]>
    g (float[4] x, float[4] w) => (float[4] y) <float[4] w = {1., 2., 3., 4.}> { y = Add(x, w) }
    """
    assert [spec.name for spec in load_onnx(write(tmp_path, text)).inputs] == ["x"]


def test_unknown_rank_is_told(tmp_path: Path) -> None:
    proto = parser.parse_model(RELU)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert load_onnx(write_proto(tmp_path, proto)).inputs[0].shape == ANY_RANK


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + b"0" * 50, "zip archive"),
        (b'<?xml version="1.0"?><net name="n"/>', "OpenVINO IR"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 50, "HDF5"),
        (b"\x1c\x00\x00\x00TFL3" + b"0" * 50, "TensorFlow Lite"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello, I am a text file of some length", "not an ONNX model"),
        (bytes(range(256)), "not an ONNX model"),
    ],
)
def test_what_is_not_onnx_is_said_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said) as caught:
        load_onnx(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_onnx(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="folder"):
        load_onnx(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, RELU.replace("Relu(x)", "Relu(x)"))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("DequantizeLinear", "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"),
        ("MatMulInteger", "q = QuantizeLinear(x, s, z) m = MatMulInteger(q, q) y = Cast<to: int = 1>(m)"),
        ("DynamicQuantizeLinear", "q, t, u = DynamicQuantizeLinear(x) y = DequantizeLinear(q, t, u)"),
    ],
)
def test_quantized_models_are_recognised(tmp_path: Path, op: str, body: str) -> None:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4, 4] x) => (float[4, 4] y) <float s = {{0.1}}, uint8 z = {{128}}> {{ {body} }}
    """
    assert f"1 {op}" in load_onnx(write(tmp_path, text)).quantized


# --------------------------------------------------------------------------- external data


def test_external_data_is_read_and_hashed(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    facts = load_onnx(path)
    assert facts.external_data == (tmp_path / "weights.bin",)
    assert facts.size_bytes == path.stat().st_size + 16
    (tmp_path / "weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    assert load_onnx(path).sha256 != facts.sha256


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "/etc/passwd",
        "C:\\weights.bin",
        "sub/../../weights.bin",
        "..\\weights.bin",
        "\\\\host\\w",
    ],
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(b"0" * 16)
    with pytest.raises(ModelError, match="does not lie in the model's folder"):
        load_onnx(external_model(folder, location))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = external_model(folder)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="leads out"):
        load_onnx(path)


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external_model(tmp_path, size=8)
    with pytest.raises(ModelError, match="cut short"):
        load_onnx(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="missing"):
        load_onnx(path)


@pytest.mark.slow
def test_a_model_over_2_gb_costs_little_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    columns = 600_000_000
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (int64[1] i) => (float[1] y) { y = Gather(w, i) }
        """
    )
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.data_location = "w", TensorProto.FLOAT, TensorProto.EXTERNAL
    tensor.dims.append(columns)
    for key, value in (("location", "w.bin"), ("length", str(4 * columns))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(4 * columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = load_model(write_proto(tmp_path, proto))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert source.onnx.size_bytes > 2**31
    # Mapped pages that were read count as resident; what matters is that no copy of the weights is made.
    assert grown < 1.2 * 4 * columns / 1024


# --------------------------------------------------------------------------- refusals


def test_custom_operator_is_named(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]>
    g (float[4] x) => (float[4] y) { h = Relu(x) y = my.domain.Fancy(h) }
    """
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(write(tmp_path, text))
    message = str(caught.value)
    assert (
        all(word in message for word in ('"y"', "Fancy", "my.domain", "extract_model"))
        and "\n" not in message
    )


def test_operator_without_conversion_in_the_default_domain_is_named(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 22]>
    g (float[4, 4] x) => (float y) { y = Det(x) }
    """
    with pytest.raises(UnsupportedModelError, match=r'output "y" \(operator Det, domain ai.onnx\)'):
        load_model(write(tmp_path, text))


@pytest.mark.parametrize("role", ["input", "output"])
def test_strings_are_refused(tmp_path: Path, role: str) -> None:
    inputs, outputs = ("string[2] x", "string[2] y")
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g ({inputs if role == "input" else "float[2] x"}) => ({outputs}) {{ y = Cast<to: int = 8>(x) }}
    """
    with pytest.raises(UnsupportedModelError, match=f'{role} "[xy]" holds strings'):
        load_model(write(tmp_path, text))


def test_sequence_output_is_refused(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (seq(float[1]) y) { y = SplitToSequence(x) }
    """
    with pytest.raises(UnsupportedModelError, match="SplitToSequence"):
        load_model(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd_noisy_relu_custom_op.onnx", ['output "Y"', "operator NoisyRelu", "domain MyNoisyReluDomain"]),
        ("odd_mnist_coreml_zipmap_opset7.onnx", ['"ZipMap"', "domain ai.onnx.ml", '"prediction1"', "zipmap"]),
        ("silero_vad.onnx", ['"If_0"', "operator ReduceMean", "without If"]),
    ],
)
def test_odd_models_are_refused_with_the_node(shared: Path, name: str, words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(shared / "models" / name)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [] and "\n" not in message
