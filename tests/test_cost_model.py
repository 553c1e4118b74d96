from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from vinoopt.cost_model import layer_costs, layer_precisions, roofline
from vinoopt.errors import ShapeError
from vinoopt.hardware.profile import load_profile
from vinoopt.records import Device, DeviceSpec, Evidence, Figure, Precision


def parameter(*shape: int) -> Any:
    return ops.parameter(list(shape), np.float32)


def constant(*shape: int, dtype: type = np.float32) -> Any:
    return ops.constant(np.ones(shape, dtype))


def model(node: Any, *inputs: Any) -> ov.Model:
    return ov.Model([node], list(inputs), "m")


def levels(data: Any) -> Any:
    return ops.fake_quantize(data, *(ops.constant(np.float32(v)) for v in (0, 2.55, 0, 2.55)), 256)


def simple_spec(**changes: Any) -> DeviceSpec:
    fields: dict[str, Any] = {
        "kind": Device.GPU,
        "name": "board",
        "architecture": "x",
        "precisions": (Precision.INT8, Precision.F16, Precision.F32),
        "channel_multiple": 16,
        "bandwidth_gb_per_s": Figure(value=10, source="s"),
        "peak_gops": {
            Precision.INT8: Figure(value=400, source="s"),
            Precision.F16: Figure(value=200, source="s"),
            Precision.F32: Figure(value=100, source="s"),
        },
    }
    return DeviceSpec(**{**fields, **changes})


# --------------------------------------------------------------------------- products and bytes


def conv() -> tuple[ov.Model, int]:
    data = parameter(2, 8, 10, 10)
    node = ops.convolution(data, constant(16, 8, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1])
    return model(node, data), 2 * 16 * 5 * 5 * 8 * 9


def depthwise() -> tuple[ov.Model, int]:
    data = parameter(1, 8, 10, 10)
    node = ops.group_convolution(data, constant(8, 1, 1, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
    return model(node, data), 8 * 10 * 10 * 9


def deconv() -> tuple[ov.Model, int]:
    data = parameter(1, 8, 5, 5)
    node = ops.convolution_backprop_data(data, constant(8, 4, 2, 2), [2, 2])
    return model(node, data), 5 * 5 * 8 * 4 * 4


def matmul() -> tuple[ov.Model, int]:
    data = parameter(3, 7, 32)
    return model(ops.matmul(data, constant(20, 32), False, True), data), 3 * 7 * 20 * 32


def matmul_transposed() -> tuple[ov.Model, int]:
    data = parameter(32, 7)
    return model(ops.matmul(data, constant(32, 20), True, False), data), 7 * 20 * 32


def attention() -> tuple[ov.Model, int]:
    query, key, value = parameter(1, 4, 6, 16), parameter(1, 4, 9, 16), parameter(1, 4, 9, 8)
    node = ops.scaled_dot_product_attention(query, key, value)
    return model(node, query, key, value), 4 * 6 * 9 * (16 + 8)


def lstm() -> tuple[ov.Model, int]:
    data, hidden, cell = parameter(2, 5, 12), parameter(2, 1, 10), parameter(2, 1, 10)
    lengths = ops.constant(np.array([5, 5], np.int64))
    weights = constant(1, 40, 12), constant(1, 40, 10), constant(1, 40)
    node = ops.lstm_sequence(data, hidden, cell, lengths, *weights, 10, "forward")
    return model(node.output(0), data, hidden, cell), 2 * 5 * 40 * (12 + 10)


@pytest.mark.parametrize("build", [conv, depthwise, deconv, matmul, matmul_transposed, attention, lstm])
def test_products(build: Any):
    built, macs = build()
    assert sum(cost.macs for cost in layer_costs(built)) == macs


def test_bytes_of_a_convolution():
    (cost,) = layer_costs(conv()[0])
    assert cost.weights == 16 * 8 * 9
    assert cost.activations == 2 * 8 * 100 + 2 * 16 * 25


def test_compressed_weights_count_as_stored():
    data = parameter(4, 32)
    weights = ops.multiply(ops.convert(constant(20, 32, dtype=np.int8), np.float32), constant(20, 1))
    (cost,) = layer_costs(model(ops.matmul(data, weights, False, True), data))
    assert (cost.weights, cost.stored_bytes) == (640, 640.0)
    (whole,) = layer_costs(model(ops.matmul(data, constant(20, 32), False, True), data))
    assert (whole.weights, whole.stored_bytes) == (640, 2560.0)
    spec = simple_spec(bandwidth_gb_per_s=Figure(value=1e-3, source="s"))
    times = [
        roofline(model(ops.matmul(data, each, False, True), data), spec).latency_ms
        for each in (weights, constant(20, 32))
    ]
    moved = [640 + 2 * 4 * 52, 2 * 640 + 2 * 4 * 52]  # a byte for each weight, and two
    assert times == pytest.approx([each / 1e3 for each in moved])


def test_elementwise_layers_run_inside_their_producer():
    data = parameter(1, 8, 10, 10)
    node = ops.convolution(data, constant(8, 8, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])
    chain = ops.reshape(levels(ops.relu(ops.add(node, constant(1, 8, 1, 1)))), [1, 800], False)
    (cost,) = layer_costs(model(chain, data))
    assert cost.type == "Convolution"


def test_second_tensor_of_a_sum_is_read():
    left, right = parameter(1, 8, 4, 4), parameter(1, 8, 4, 4)
    (cost,) = layer_costs(model(ops.add(left, right), left, right))
    assert (cost.type, cost.macs, cost.activations) == ("Add", 0, 128)


def test_layers_that_depend_on_shapes_alone_cost_nothing():
    data = parameter(1, 8, 4, 4)
    target = ops.broadcast(ops.constant(np.int64(1)), ops.shape_of(ops.shape_of(data)))
    bias = ops.reshape(constant(1), target, False)
    costs = layer_costs(model(ops.softmax(ops.add(data, bias), 1), data))
    assert [cost.type for cost in costs] == ["Softmax"]


def test_dynamic_shape_is_named():
    data = ops.parameter([-1, 8], np.float32)
    node = ops.softmax(data, 1)
    node.set_friendly_name("classes")
    with pytest.raises(ShapeError, match=r"classes|Parameter"):
        layer_costs(model(node, data))


def test_control_flow_is_not_counted_and_says_so():
    data = parameter(1, 8)
    body_in = ops.parameter([1, 8], np.float32)
    branch = ov.Model([ops.result(ops.relu(body_in))], [body_in], "b")
    other_in = ops.parameter([1, 8], np.float32)
    other = ov.Model([ops.result(ops.exp(other_in))], [other_in], "o")
    condition = ops.parameter([], np.bool_)
    node = ops.if_op(condition.output(0))
    node.set_then_body(branch)
    node.set_else_body(other)
    node.set_input(data.output(0), body_in, other_in)
    out = node.set_output(branch.results[0], other.results[0])
    found = roofline(model(ops.softmax(out, 1), data, condition), simple_spec())
    assert any("If" in note for note in found.notes)


@given(
    groups=st.integers(1, 4),
    channels=st.integers(1, 5),
    kernel=st.integers(1, 3),
    size=st.integers(3, 9),
)
@settings(max_examples=25, deadline=None)
def test_grouping_divides_the_products(groups: int, channels: int, kernel: int, size: int):
    width = groups * channels
    data = parameter(1, width, size, size)
    none = [0, 0]
    dense = ops.convolution(data, constant(width, width, kernel, kernel), [1, 1], none, none, [1, 1])
    weights = constant(groups, channels, channels, kernel, kernel)
    grouped = ops.group_convolution(data, weights, [1, 1], none, none, [1, 1])
    counts = [sum(c.macs for c in layer_costs(model(node, data))) for node in (dense, grouped)]
    assert counts[0] == groups * counts[1]


@pytest.mark.parametrize(
    ("file", "million"), [("squeezenet1.0_fp32.onnx", 349), ("mobilenetv2_1.0_224_qatdeq.onnx", 301)]
)
def test_products_of_known_networks(shared: Path, file: str, million: int):
    loaded = ov.Core().read_model(shared / "models" / file)
    loaded.reshape([1, 3, 224, 224])
    assert round(sum(cost.macs for cost in layer_costs(loaded)) / 1e6) == million


# --------------------------------------------------------------------------- precisions and time


def quantized_matmul() -> ov.Model:
    data = parameter(64, 512)
    node = ops.matmul(levels(data), levels(constant(512, 512)), False, True)
    node.set_friendly_name("dense")
    return model(node, data)


def test_quantized_layers_are_found():
    assert layer_precisions(quantized_matmul()) == {"dense": Precision.INT8}
    assert layer_precisions(matmul()[0]) == {}


def test_quantizer_reaches_through_pooling_and_concatenation():
    data = parameter(1, 8, 4, 4)
    joined = ops.concat([levels(data), levels(ops.relu(data))], 1)
    pooled = ops.max_pool(joined, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    node = ops.convolution(pooled, levels(constant(4, 16, 1, 1)), [1, 1], [0, 0], [0, 0], [1, 1])
    assert list(layer_precisions(model(node, data)).values()) == [Precision.INT8]
    half = ops.concat([levels(data), ops.relu(data)], 1)
    node = ops.convolution(half, levels(constant(4, 16, 1, 1)), [1, 1], [0, 0], [0, 0], [1, 1])
    assert layer_precisions(model(node, data)) == {}


def test_weights_stored_in_16_bits_are_not_quantized():
    data = parameter(4, 32)
    weights = ops.convert(constant(20, 32, dtype=np.float16), np.float32)
    assert layer_precisions(model(ops.matmul(levels(data), weights, False, True), data)) == {}


def test_roofline_takes_the_longer_side():
    found = roofline(quantized_matmul(), simple_spec())
    (layer,) = found.layers
    assert layer.precision is Precision.INT8
    assert layer.compute_ms == pytest.approx(2 * 64 * 512 * 512 / 400e9 * 1e3)
    assert layer.memory_ms == pytest.approx((512 * 512 + 2 * 64 * 512) / 10e9 * 1e3)
    assert found.latency_ms == layer.ms == max(layer.compute_ms, layer.memory_ms)
    assert found.evidence is Evidence.MODELLED
    assert "lower bound" in found.source


def test_precision_can_be_asked_per_layer():
    slow = roofline(quantized_matmul(), simple_spec(), precisions={})
    fast = roofline(quantized_matmul(), simple_spec(), precisions={"dense": Precision.INT8})
    assert slow.layers[0].precision is Precision.F16
    assert slow.latency_ms is not None
    assert fast.latency_ms is not None
    assert slow.latency_ms == pytest.approx(2 * fast.latency_ms)
    widest = roofline(quantized_matmul(), simple_spec(), precisions={}, float_precision=Precision.F32)
    assert widest.layers[0].precision is Precision.F32


def test_layer_on_vector_units_computes_at_the_rate_of_f32_and_moves_what_it_moved():
    spec = simple_spec()
    fast = roofline(quantized_matmul(), spec).layers[0]
    slow = roofline(quantized_matmul(), spec, on_vector_units=["dense"]).layers[0]
    assert slow.compute_ms == pytest.approx(
        fast.compute_ms * spec.peak_gops[Precision.INT8].value / spec.peak_gops[Precision.F32].value
    )
    assert (slow.memory_ms, slow.precision) == (fast.memory_ms, Precision.INT8)


def test_format_that_the_device_lacks_counts_as_float_with_a_note():
    gpu = load_profile("skylake").devices[Device.GPU]
    found = roofline(quantized_matmul(), gpu)
    assert found.layers[0].precision is Precision.F16
    assert found.latency_ms == roofline(quantized_matmul(), gpu, precisions={}).latency_ms
    assert any("int8 has no native arithmetic on Intel HD Graphics 530" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"peak_gops": {}}, ("peak_gops.f16", "peak_gops.int8")),
        ({"bandwidth_gb_per_s": None}, ("bandwidth_gb_per_s",)),
        ({"precisions": (Precision.INT8,)}, ("a float format among precisions",)),
    ],
)
def test_lacking_figures_give_no_latency(changes: dict[str, Any], missing: tuple[str, ...]):
    found = roofline(quantized_matmul(), simple_spec(**changes))
    assert found.latency_ms is None
    assert found.layers == ()
    assert found.missing == missing


def test_wider_memory_and_units_are_never_slower():
    built = conv()[0]
    times = [
        roofline(built, load_profile(name).devices[Device.GPU]).latency_ms
        for name in ("alder-lake-n100", "tiger-lake", "lunar-lake", "arc-a770")
    ]
    assert None not in times
    assert times == sorted(times, key=lambda t: t or 0.0, reverse=True)
