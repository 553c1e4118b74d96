"""Quantized weights of grouped convolutions: where their groups get an axis, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.frontend.parity import check_parity, random_samples
from vinoopt.hardware.profile import load_profile
from vinoopt.records import Build, Device, RuntimeProperties
from vinoopt.toolchains.gpu import GpuToolchain

CHANNELS = 24


class QuantizedNet:
    """A chain of convolutions as QDQ exporters write it: 8-bit tensors behind DequantizeLinear."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def held(self, values: np.ndarray) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def levels(self, value: str) -> str:
        scale, zero = self.held(np.float32(0.05)), self.held(np.uint8(100))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, scale, zero), scale, zero)

    def weights(self, shape: tuple[int, ...], *, zero: int | None, channelwise: bool) -> str:
        kind = np.int8 if zero is None else np.uint8
        whole = self.held(self.random.integers(*((-99, 99) if zero is None else (20, 220)), shape).astype(kind))
        size = (shape[0],) if channelwise else ()
        scale = self.held(np.asarray(self.random.uniform(0.001, 0.003, size), dtype=np.float32))
        shift = [] if zero is None else [self.held(np.full(size, zero, dtype=kind))]
        return self.node("DequantizeLinear", whole, scale, *shift, axis=0)

    def save(self, path: Path, output: str) -> Path:
        kind, shape = TensorProto.FLOAT, [1, CHANNELS, 16, 16]
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, kind, None)],
            self.tensors,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path


def separable(path: Path, *, depth: int) -> Path:
    """`depth` dense convolutions and a depthwise one, with weights of a zero point that no i8 can hold."""
    net, value = QuantizedNet(), "x"
    for place in range(depth + 1):
        groups = CHANNELS if place == depth // 2 else 1
        shape = (CHANNELS, CHANNELS // groups, 3 if groups > 1 else 1, 3 if groups > 1 else 1)
        weights = net.weights(shape, zero=120, channelwise=False)
        bias = net.held(np.linspace(-1, 1, CHANNELS, dtype=np.float32))
        value = net.node("Conv", net.levels(value), weights, bias, group=groups, pads=[shape[2] // 2] * 4)
    return net.save(path, net.levels(value))


def says_what_the_file_says(source: SourceModel) -> None:
    pytest.importorskip("onnxruntime")
    report = check_parity(source, random_samples(source, 2))
    assert report.checked and report.ok, report.reason


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [2, CHANNELS])
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("zero", [None, 120])
def test_groups_get_their_axis_before_dequantization(
    tmp_path: Path, kind: str, groups: int, channelwise: bool, zero: int | None
) -> None:
    net = QuantizedNet()
    weights = net.weights((CHANNELS, CHANNELS // groups, 3, 3), zero=zero, channelwise=channelwise)
    output = net.node(kind, net.levels("x"), weights, group=groups)
    source = load_model(net.save(tmp_path / "m.onnx", output))

    (layer,) = [node for node in source.model.get_ops() if node.get_type_name().startswith("GroupConvolution")]
    product = layer.input_value(1).get_node()
    assert product.get_type_name() == "Multiply"
    assert "Reshape" not in {node.get_type_name() for node in source.model.get_ops()}
    assert product.get_output_shape(0)[0] == groups
    assert any(
        node.get_type_name() == "Constant"
        and node.get_element_type() in (ov.Type.i8, ov.Type.u8)
        and list(node.get_output_shape(0)) == list(product.get_output_shape(0))
        for node in source.model.get_ops()
    )
    says_what_the_file_says(source)


def test_weights_that_two_layers_share_stay_what_they_are(tmp_path: Path) -> None:
    net = QuantizedNet()
    weights = net.weights((CHANNELS, 1, 1, 1), zero=120, channelwise=True)
    grouped = net.node("Conv", net.levels("x"), weights, group=CHANNELS)
    source = load_model(net.save(tmp_path / "m.onnx", net.node("Mul", grouped, net.node("ReduceMax", weights))))
    says_what_the_file_says(source)


def compiled(model: ov.Model, profile: str, folder: Path) -> Build:
    spec, toolchain = load_profile(profile).devices[Device.GPU], GpuToolchain()
    found = toolchain.probe(spec)
    if not found.ok:
        pytest.skip(f"{profile}: {found.reason}; {found.fix}")
    ov.save_model(model, folder / "m.xml", compress_to_fp16=False)
    return toolchain.compile(
        folder / "m.xml", spec, properties=RuntimeProperties(), output=folder / "blob", timeout_s=300
    )


@pytest.mark.offline
@pytest.mark.parametrize("profile", ["skylake", "ice-lake"])
def test_gpus_without_int8_take_deep_networks(tmp_path: Path, profile: str) -> None:
    build = compiled(load_model(separable(tmp_path / "m.onnx", depth=10)).model, profile, tmp_path)
    assert (build.details["mac_layers"], build.details["mac_layers_reference"]) == ("11", "0")


@pytest.mark.offline
def test_gpu_with_int8_runs_depthwise_layers_in_it(tmp_path: Path) -> None:
    build = compiled(load_model(separable(tmp_path / "m.onnx", depth=2)).model, "alder-lake", tmp_path)
    assert build.details["mac_layers_reference"] == "0"
    assert build.details["mac_layers_int8"] == "3"


@pytest.mark.slow
@pytest.mark.offline
@pytest.mark.parametrize(("profile", "int8"), [("skylake", 0), ("ice-lake", 0), ("alder-lake", 52)])
def test_quantized_mobilenet_compiles_on_every_generation(
    shared: Path, tmp_path: Path, profile: str, int8: int
) -> None:
    source = load_model(shared / "models" / "mobilenetv2_1.0_224_qat_qdq_u8.onnx")
    build = compiled(source.model, profile, tmp_path)
    assert build.details["mac_layers_int8"] == str(int8)
    assert (build.details["mac_layers"], build.details["mac_layers_reference"]) == ("53", "0")
