"""A mirror in PyTorch equals OpenVINO, operator by operator and on whole models; what it trains goes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
from openvino import opset1, opset11, opset15

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'vinoopt[distill]'")

from vinoopt.distillation.equality import check_batches, check_equality, departure, run  # noqa: E402
from vinoopt.distillation.mirror import Mirror  # noqa: E402
from vinoopt.distillation.plain_float import spelled_out  # noqa: E402
from vinoopt.errors import DistillationError  # noqa: E402
from vinoopt.frontend.normalize import load_model  # noqa: E402

RNG = np.random.default_rng(0)
IMAGE, ROW = (2, 4, 9, 8), (2, 6)
Make = Callable[[ov.Node], Any]


def f32(*shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def ints(*values: int) -> ov.Node:
    return op.constant(np.array(values, np.int64))


def scalar(value: float) -> ov.Node:
    return op.constant(np.float32(value))


def sequence(kind: Callable[..., ov.Node], gates: int, biases: int, **options: Any) -> Make:
    def make(x: ov.Node) -> ov.Node:
        directions = 2 if options.get("direction") == "bidirectional" else 1
        state = [op.constant(f32(2, directions, 3)) for _ in range(2 if gates == 4 else 1)]
        weights = [f32(directions, 3 * gates, n) for n in (8, 3)] + [f32(directions, 3 * biases)]
        settings = {"direction": "forward", **options}
        x = op.reshape(x, ints(2, 36, 8), False)
        return kind(x, *state, ints(36, 36), *map(op.constant, weights), 3, **settings)

    return make


IMAGES: dict[str, Make] = {
    "convolution": lambda x: op.convolution(x, f32(5, 4, 3, 3), [2, 1], [1, 0], [1, 0], [1, 2]),
    "convolution, uneven pads": lambda x: op.convolution(x, f32(5, 4, 3, 3), [1, 1], [0, 1], [2, 1], [1, 1]),
    "convolution, same upper": lambda x: op.convolution(
        x, f32(5, 4, 4, 4), [2, 2], [0, 0], [0, 0], [1, 1], "same_upper"
    ),
    "convolution with bias": lambda x: op.add(
        op.convolution(x, f32(5, 4, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]), f32(1, 5, 1, 1)
    ),
    "convolution in one dimension": lambda x: op.convolution(
        op.reshape(x, ints(2, 4, 72), False), f32(5, 4, 3), [1], [1], [1], [1]
    ),
    "grouped convolution": lambda x: op.group_convolution(x, f32(2, 3, 2, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]),
    "transposed convolution": lambda x: op.convolution_backprop_data(
        x, f32(4, 3, 3, 3), [2, 2], None, [1, 0], [1, 1], [1, 1], output_padding=[1, 0]
    ),
    "max pool, ceil": lambda x: op.max_pool(x, [2, 2], [1, 1], [0, 1], [0, 1], [3, 3], "ceil"),
    "max pool": lambda x: op.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]),
    "average pool": lambda x: op.avg_pool(x, [2, 2], [1, 1], [1, 1], [3, 3], False),
    "average pool, without pads": lambda x: op.avg_pool(x, [2, 1], [1, 0], [1, 1], [3, 2], True),
    "adaptive average pool": lambda x: op.adaptive_avg_pool(x, ints(4, 3)),
    "adaptive max pool": lambda x: op.adaptive_max_pool(x, ints(4, 3), "i32"),
    "nearest": lambda x: op.interpolate(x, np.array([18, 12]), "nearest", "sizes", axes=np.array([2, 3])),
    "nearest, floor": lambda x: opset11.interpolate(
        x, np.array([2.0, 2.0], np.float32), "nearest", "scales", axes=np.array([2, 3]),
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    "linear": lambda x: opset11.interpolate(x, np.array([17, 13]), "linear_onnx", "sizes", axes=np.array([2, 3])),
    "linear, aligned": lambda x: opset11.interpolate(
        x, np.array([5, 16]), "linear_onnx", "sizes", axes=np.array([2, 3]),
        coordinate_transformation_mode="align_corners",
    ),
    "cubic": lambda x: opset11.interpolate(x, np.array([17, 13]), "cubic", "sizes", axes=np.array([2, 3])),
    "MVN": lambda x: op.mvn(x, ints(2, 3), True, 1e-5, "inside_sqrt"),
    "MVN, outside": lambda x: op.mvn(x, ints(1), True, 1e-5, "outside_sqrt"),
    "L2": lambda x: op.normalize_l2(x, ints(1), 1e-6, "add"),
    "LRN": lambda x: op.lrn(x, ints(1), 1e-3, 0.75, 1.0, 3),
    "batch norm": lambda x: op.batch_norm_inference(x, f32(4), f32(4), f32(4), np.abs(f32(4)), 1e-5),
    "group norm": lambda x: opset15.group_normalization(x, f32(4), f32(4), 2, 1e-5),
    "GRN": lambda x: opset1.grn(x, 1.0),
    "transpose": lambda x: op.transpose(x, ints(0, 2, 3, 1)),
    "reshape with zero": lambda x: op.reshape(x, ints(0, -1), True),
    "squeeze": lambda x: op.squeeze(op.unsqueeze(x, ints(1, -1)), ints(1)),
    "concat": lambda x: op.concat([x, op.relu(x)], 1),
    "split": lambda x: op.add(*op.split(x, op.constant(1), 2).outputs()),
    "variadic split": lambda x: op.variadic_split(x, op.constant(2), ints(2, -1)).output(1),
    "slice": lambda x: op.slice(x, ints(1, 7), ints(9, -9), ints(2, -2), ints(2, 3)),
    "strided slice": lambda x: op.strided_slice(
        x, ints(0, 1, 0, 2), ints(0, 2, 0, 8), ints(1, 1, 1, 3), [1, 0, 1, 0], [1, 0, 1, 0], [], [0, 1, 0, 0], []
    ),
    "pad": lambda x: op.pad(x, ints(0, 1, 2, 0), ints(0, 0, 1, 3), "constant", scalar(0.5)),
    "pad, reflect": lambda x: op.pad(x, ints(0, 0, 2, 1), ints(0, 0, 1, 3), "reflect"),
    "pad, symmetric": lambda x: op.pad(x, ints(0, 0, 2, 1), ints(0, 0, 1, 3), "symmetric"),
    "pad, edge": lambda x: op.pad(x, ints(0, 0, 2, 1), ints(0, 0, 1, 3), "edge"),
    "gather": lambda x: op.gather(x, op.constant(np.array([[3, 0], [-1, 1]])), op.constant(1)),
    "gather, per sample": lambda x: op.gather(
        x, op.constant(np.array([[3, 0, 1], [-1, 1, 2]])), op.constant(1), batch_dims=1
    ),
    "gather, per sample and channel": lambda x: op.gather(
        x, op.constant(RNG.integers(0, 8, (2, 4, 5))), op.constant(3), batch_dims=2
    ),
    "roll": lambda x: op.roll(x, ints(2, -3), ints(2, 3)),
    "roll, one shift": lambda x: op.roll(x, ints(1), ints(2)),
    "grid sample": lambda x: opset11.grid_sample(
        x, op.constant(f32(2, 5, 6, 2, scale=0.6)), {"mode": "bilinear", "padding_mode": "border"}
    ),
    "grid sample, aligned": lambda x: opset11.grid_sample(
        x, op.constant(f32(2, 5, 6, 2, scale=0.6)), {"mode": "bicubic", "align_corners": True}
    ),
    "strided slice, ellipsis": lambda x: op.strided_slice(
        x, ints(0, 0, 2), ints(1, 0, 8), ints(1, 1, 3), [0, 0, 0], [0, 0, 0], [], [], [0, 1, 0]
    ),
    "strided slice, ellipsis and new axis": lambda x: op.strided_slice(
        x, ints(0, 0, 1), ints(0, 0, 0), ints(1, 1, 1), [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]
    ),
    "tile": lambda x: op.tile(x, ints(1, 2, 1, 3)),
    "broadcast": lambda x: op.broadcast(op.slice(x, ints(0), ints(1), ints(1), ints(2)), ints(2, 4, 5, 8)),
    "shape": lambda x: op.reshape(
        x, op.concat([op.gather(op.shape_of(x), ints(0), op.constant(0)), ints(-1)], 0), False
    ),
    "depth to space": lambda x: op.depth_to_space(x, "blocks_first", 2),
    "depth to space, depth first": lambda x: op.depth_to_space(x, "depth_first", 2),
    "space to depth": lambda x: op.space_to_depth(
        op.pad(x, ints(0, 0, 0, 0), ints(0, 0, 1, 0), "edge"), "blocks_first", 2
    ),
    "space to depth, depth first": lambda x: op.space_to_depth(
        op.pad(x, ints(0, 0, 0, 0), ints(0, 0, 1, 0), "edge"), "depth_first", 2
    ),
    "shuffle": lambda x: op.shuffle_channels(x, 1, 2),
    "top k": lambda x: op.topk(x, 3, 3, "max", "value"),
    "LSTM": sequence(op.lstm_sequence, 4, 4),
    "LSTM, both ways": sequence(op.lstm_sequence, 4, 4, direction="bidirectional"),
    "GRU": sequence(op.gru_sequence, 3, 3),
    "GRU, reset after": sequence(op.gru_sequence, 3, 4, linear_before_reset=True),
    "RNN": sequence(op.rnn_sequence, 1, 1),
    "attention": lambda x: op.scaled_dot_product_attention(x, op.relu(x), op.tanh(x), causal=False),
    "attention, causal": lambda x: op.scaled_dot_product_attention(x, op.relu(x), op.tanh(x), causal=True),
    "per-tensor quantizer": lambda x: op.fake_quantize(x, *map(scalar, (-1.28, 1.27, -1.28, 1.27)), 256),
    "quantizer onto another range": lambda x: op.fake_quantize(x, *map(scalar, (-1.0, 2.0, 0.0, 9.0)), 16),
    "per-channel quantizer": lambda x: op.fake_quantize(x, *_per_channel(), 255),
}  # fmt: skip


def _per_channel() -> list[np.ndarray[Any, Any]]:
    high = np.abs(f32(1, 4, 1, 1)) + np.float32(0.1)
    return [-high, high, -high, high]


UNARY = [
    "abs", "acos", "asin", "atan", "cos", "cosh", "erf", "exp", "floor", "ceiling", "hsigmoid", "hswish", "mish",
    "negative", "relu", "sigmoid", "sign", "sin", "sinh", "softplus", "tan", "tanh", "softsign",
]  # fmt: skip
ROWS: dict[str, Make] = {
    **{
        name: lambda x, name=name: getattr(op, name)(x)  # type: ignore[misc]
        for name in UNARY
    },
    "log": lambda x: op.log(op.exp(x)),
    "sqrt": lambda x: op.sqrt(op.abs(x)),
    "elu": lambda x: op.elu(x, 0.7),
    "selu": lambda x: op.selu(x, scalar(1.6), scalar(1.05)),
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu, tanh": lambda x: op.gelu(x, "tanh"),
    "clamp": lambda x: op.clamp(x, -0.3, 0.4),
    "hard sigmoid": lambda x: op.hard_sigmoid(x, scalar(0.3), scalar(0.4)),
    "swish": lambda x: op.swish(x, scalar(1.3)),
    "prelu": lambda x: op.prelu(x, np.abs(f32(6))),
    "round": lambda x: op.round(op.multiply(x, scalar(3)), "half_to_even"),
    "softmax": lambda x: op.softmax(x, 1),
    "log softmax": lambda x: op.log_softmax(x, 1),
    "add, multiply, subtract, divide": lambda x: op.divide(
        op.subtract(op.multiply(op.add(x, f32(1, 6)), f32(6)), f32(2, 1)), scalar(3)
    ),
    "power": lambda x: op.power(op.abs(x), scalar(1.5)),
    "minimum, maximum": lambda x: op.minimum(op.maximum(x, f32(6)), f32(2, 6)),
    "mod": lambda x: op.mod(x, scalar(0.4)),
    "floor mod": lambda x: op.floor_mod(x, scalar(0.4)),
    "squared difference": lambda x: op.squared_difference(x, f32(6)),
    "select": lambda x: op.select(op.greater(x, scalar(0)), x, op.multiply(x, scalar(0.1))),
    "logical": lambda x: op.convert(
        op.logical_or(op.logical_and(op.greater(x, scalar(0)), op.less(x, scalar(1))), op.equal(x, x)), "f32"
    ),
    "whole numbers": lambda x: op.convert(
        op.divide(op.convert(op.multiply(op.abs(x), scalar(9)), "i64"), op.constant(np.int64(2))), "f32"
    ),
    "reductions": lambda x: op.add(
        op.add(op.reduce_mean(x, ints(1), True), op.reduce_max(x, ints(1), True)),
        op.add(op.reduce_sum(x, ints(0, 1), True), op.reduce_min(x, ints(-1), True)),
    ),
    "norm reductions": lambda x: op.add(op.reduce_l1(x, ints(1), True), op.reduce_l2(x, ints(1), True)),
    "product": lambda x: op.reduce_prod(x, ints(1), False),
    "cumulative sum": lambda x: op.cum_sum(x, op.constant(1), exclusive=True, reverse=True),
    "matmul": lambda x: op.matmul(x, f32(5, 6), False, True),
    "matmul, transposed": lambda x: op.matmul(f32(2, 5), x, True, False),
    "batched matmul": lambda x: op.matmul(op.reshape(x, ints(2, 2, 3), False), f32(2, 3, 4), False, False),
    "embedding": lambda x: op.gather(
        op.constant(f32(7, 5)), op.convert(op.clamp(op.abs(op.multiply(x, scalar(3))), 0, 6), "i64"), op.constant(0)
    ),
    "one-hot": lambda x: op.one_hot(
        op.convert(op.clamp(op.abs(x), 0, 3), "i64"), op.constant(4), scalar(1), scalar(0), -1
    ),
    "gather elements": lambda x: op.gather_elements(x, op.constant(np.array([[0, 5, 1], [2, -1, 3]])), 1),
    "scatter": lambda x: op.scatter_elements_update(
        x, op.constant(np.array([[0, 5], [2, 3]])), f32(2, 2), op.constant(1)
    ),
    "einsum": lambda x: op.einsum([x, op.relu(x)], "bi,bj->bij"),
    "range": lambda x: op.add(x, op.convert(op.range(op.constant(0), op.constant(6), op.constant(1), "i64"), "f32")),
    "LSTM cell": lambda x: op.lstm_cell(x, f32(2, 3), f32(2, 3), f32(12, 6), f32(12, 3), f32(12), 3),
    "GRU cell": lambda x: op.gru_cell(x, f32(2, 3), f32(9, 6), f32(9, 3), f32(9), 3),
    "weights in eight bits": lambda x: op.matmul(
        x,
        op.multiply(
            op.subtract(
                op.convert(op.constant(RNG.integers(0, 255, (5, 6)).astype(np.uint8)), "f32"),
                op.convert(op.constant(np.array([[128]], np.uint8)), "f32"),
            ),
            np.abs(f32(5, 1)),
        ),
        False,
        True,
    ),
}
CASES = [*((name, make, IMAGE) for name, make in IMAGES.items()), *((name, make, ROW) for name, make in ROWS.items())]


def graph(make: Make, *shape: int) -> ov.Model:
    x = op.parameter(list(shape), np.float32, name="x")
    made = make(x)
    return ov.Model([made if isinstance(made, ov.Output) else made.output(0)], [x], "net")


def calls(model: ov.Model, count: int = 2, scale: float = 0.4) -> list[list[Any]]:
    rng = np.random.default_rng(3)
    shapes = [[d.get_length() if d.is_static else 1 for d in each.get_partial_shape()] for each in model.inputs]
    return [[torch.from_numpy((rng.normal(size=s) * scale).astype(np.float32)) for s in shapes] for _ in range(count)]


@pytest.mark.parametrize(("make", "shape"), [(m, s) for _, m, s in CASES], ids=[name for name, *_ in CASES])
def test_operator_equals_openvino(make: Make, shape: tuple[int, ...]) -> None:
    model = graph(make, *shape)
    check_equality(Mirror(model), calls(model))


def test_an_operator_without_a_rule_is_named() -> None:
    boxes, scores = op.constant(f32(1, 6, 4)), op.parameter([1, 1, 6], np.float32, name="x")
    found = op.non_max_suppression(boxes, scores, op.constant(3))
    found.set_friendly_name("the boxes")
    model = ov.Model([found.output(0)], [scores], "net")
    with pytest.raises(DistillationError, match=r"NonMaxSuppression.*the boxes"):
        Mirror(model)


def test_a_mirror_that_differs_is_refused() -> None:
    model = graph(lambda x: op.matmul(x, f32(5, 6), False, True), *ROW)
    mirror = Mirror(model)
    with torch.no_grad():
        mirror.values[0].mul_(1.01)
    with pytest.raises(DistillationError, match="departs from OpenVINO"):
        check_equality(mirror, calls(model))


@pytest.mark.parametrize("ends", [(-1.28, 1.27), (-0.4, 2.15)], ids=["even", "skewed"])
@pytest.mark.parametrize("kind", ["i8", "fake quantize"])
def test_what_is_trained_goes_back_into_the_model(kind: str, ends: tuple[float, float]) -> None:
    stored = RNG.integers(-127, 128, (5, 4, 3, 3)).astype(np.int8)
    scale = np.abs(f32(5, 1, 1, 1)) / 127

    def make(x: ov.Node) -> ov.Node:
        x = op.fake_quantize(x, *map(scalar, (*ends, *ends)), 256)
        if kind == "i8":
            weight: Any = op.multiply(op.convert(op.constant(stored), "f32"), scale)
        else:
            bounds = [-127 * scale, 127 * scale] * 2
            weight = op.fake_quantize(op.constant(f32(5, 4, 3, 3, scale=0.1)), *bounds, 255)
        x = op.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])
        return op.relu(op.add(x, f32(1, 5, 1, 1)))

    model = graph(make, *IMAGE)
    before = run(spelled_out(model), calls(model), {"INFERENCE_PRECISION_HINT": "f32"})
    mirror = Mirror(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mirror.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    mirror.write()
    assert len(mirror.values) == 2, "weight and bias"
    assert len(mirror.scales) == 1, "of the weight"
    assert len(mirror.ranges) == (2 if ends[0] == -0.4 else 1), "range, and the upper end of a skewed one"
    check_equality(mirror, calls(model))  # against the model as written
    check_equality(Mirror(model), calls(model))  # and read anew
    after = run(spelled_out(model), calls(model), {"INFERENCE_PRECISION_HINT": "f32"})
    assert departure(after[0][0], before[0][0]) > 0.01


def test_a_graph_for_one_call_takes_several_where_that_is_the_same() -> None:
    def classifier(x: ov.Node) -> ov.Node:
        x = op.reduce_mean(op.relu(x), ints(2, 3), True)
        return op.matmul(op.reshape(x, ints(1, 4), False), f32(4, 3), False, False)

    def across(x: ov.Node) -> ov.Node:
        return op.subtract(x, op.reduce_mean(x, ints(0), True))  # joins the samples of a call

    def transformer(x: ov.Node) -> ov.Node:
        tokens = op.transpose(op.reshape(x, ints(1, 4, 25), False), ints(0, 2, 1))
        tokens = op.concat([op.constant(f32(1, 1, 4)), tokens], 1)
        return op.reduce_sum(op.add(tokens, f32(1, 26, 4)), ints(1), False)

    for make, together in ((classifier, True), (transformer, True), (across, False)):
        model = graph(make, 1, 4, 5, 5)
        assert check_batches(Mirror(model), calls(model, 3)) is together


@pytest.mark.parametrize("kind", ["bf16", "u4", "i4"])
def test_constants_of_few_bits_are_read_as_they_are(kind: str) -> None:
    stored = np.array([[1, 2, 3, 7, 0, 5]] * 4, np.float32 if kind == "bf16" else np.int8)
    constant = op.constant(stored, {"bf16": ov.Type.bf16, "u4": ov.Type.u4, "i4": ov.Type.i4}[kind])
    scaled = op.multiply(op.convert(constant, "f32"), f32(4, 1))
    model = graph(lambda x: op.matmul(x, scaled, False, True), *ROW)
    check_equality(Mirror(model), calls(model))


@pytest.mark.parametrize("kind", ["plain", "half", "swapped"])
def test_weights_in_eight_bits_are_found_however_their_scale_is_given(kind: str) -> None:
    integers = op.convert(op.constant(RNG.integers(-127, 128, (5, 6)).astype(np.int8)), "f32")
    scale: Any = op.constant(np.abs(f32(5, 1)) + np.float32(0.01))
    if kind == "half":
        scale = op.convert(op.constant((np.abs(f32(5, 1)) + 0.01).astype(np.float16)), "f32")
    weight = op.multiply(scale, integers) if kind == "swapped" else op.multiply(integers, scale)
    model = graph(lambda x: op.matmul(x, weight, False, True), *ROW)
    mirror = Mirror(model)
    assert len(mirror.values) == len(mirror.scales) == 1
    with torch.no_grad():
        mirror.scales[0].add_(0.1)
    mirror.write()
    check_equality(mirror, calls(model))


def test_a_small_channel_counts_beside_a_large_one() -> None:
    scales = np.array([1e4, 1, 1, 1, 1], np.float32)
    mirror = Mirror(graph(lambda x: op.multiply(op.matmul(x, f32(5, 6), False, True), scales), *ROW))
    with torch.no_grad():
        mirror.values[0][1].mul_(1.05)
    with pytest.raises(DistillationError, match="departs from OpenVINO"):
        check_equality(mirror, calls(mirror.model))


def test_what_fails_in_pytorch_is_named() -> None:
    model = graph(lambda x: op.relu(op.matmul(x, f32(5, 6), False, True)), *ROW)
    with pytest.raises(DistillationError, match="MatMul"):
        mirror = Mirror(model)
        mirror([torch.zeros(2, 7)], mirror.results)


def test_a_norm_of_nothing_has_a_gradient() -> None:
    mirror = Mirror(graph(lambda x: op.reduce_l2(op.matmul(x, f32(5, 6), False, True), ints(1), False), *ROW))
    (norm,) = mirror([torch.zeros(2, 6)], mirror.results)
    norm.sum().backward()
    assert bool(torch.isfinite(mirror.values[0].grad).all())


REAL = [
    "cifar_resnet20.onnx", "cifar10_resnet32_akamaster_op11.onnx", "dtln_1.onnx", "dtln_2.onnx", "mnist_cntk.onnx",
    "mobilenetv2_1.0_224_qatdeq.onnx", "squeezenet1.0_fp32.onnx", "tiny_vww96_mlperf.onnx",
    "silero_vad_openvino_16k.onnx", "ultraface_rfb_320.onnx", "yolox_nano.onnx",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_a_mirror(shared: Path, name: str) -> None:
    model = load_model(shared / "models" / name).model
    check_equality(Mirror(model), calls(model, 1, scale=1.0))


def test_a_text_model_has_a_mirror(shared: Path) -> None:
    model = load_model(shared / "models" / "magika_standard_v2_1.onnx").model
    tokens = torch.from_numpy(np.load(shared / "data" / "magika_v2_1_dev.npz")["bytes"][:2].astype(np.int64))
    check_equality(Mirror(model), [[row[None]] for row in tokens])
