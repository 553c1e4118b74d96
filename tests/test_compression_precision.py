"""A quantized model with some blocks back in float, against NNCF's own result and against the float model."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.compression.precision import QuantizedPair, find_blocks, with_float_blocks
from vinoopt.compression.quantize import compress_weights, quantize
from vinoopt.compression.scope import resolve_ignored
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import Device, QuantizationPlan, TensorSpec, WeightCompressionPlan

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
SPEC = TensorSpec(name="x", shape=(1, 3, 16, 16), dtype="float32")


def conv(data: ov.Output | ov.Node, outputs: int, inputs: int, name: str, *, stride: int = 1) -> ov.Node:
    weights = ops.constant(RNG.normal(size=(outputs, inputs, 3, 3), scale=0.3).astype(np.float32))
    node = ops.convolution(data, weights, [stride, stride], [1, 1], [1, 1], [1, 1], name=name)
    bias = ops.constant(RNG.normal(size=(1, outputs, 1, 1)).astype(np.float32))
    return ops.add(node, bias, name=f"{name}/bias")


@pytest.fixture(scope="module")
def model() -> ov.Model:
    """Stem, residual block, pooling between two convolutions, a concat and a classifier."""
    x = ops.parameter([1, 3, 16, 16], np.float32, name="x")
    x.output(0).set_names({"x"})
    stem = ops.relu(conv(x, 8, 3, "stem"))
    inner = ops.relu(conv(stem, 8, 8, "inner"))
    add = ops.relu(ops.add(conv(inner, 8, 8, "outer"), stem))
    pooled = ops.max_pool(add, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    left, right = ops.relu(conv(pooled, 8, 8, "left")), ops.relu(conv(pooled, 8, 8, "right"))
    joined = ops.concat([left, right], axis=1)
    mean = ops.reduce_mean(joined, ops.constant([2, 3]), keep_dims=False)
    head = ops.matmul(
        mean, ops.constant(RNG.normal(size=(16, 5)).astype(np.float32)), False, False, name="head"
    )
    head.output(0).set_names({"y"})
    return ov.Model([head], [x], "residual")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return from_arrays(RNG.normal(size=(24, 3, 16, 16)).astype(np.float32), inputs=[SPEC])


@pytest.fixture(scope="module")
def pair(model: ov.Model, data: Dataset) -> QuantizedPair:
    quantized = quantize(model, QuantizationPlan(subset_size=24), data, device=Device.CPU)
    return QuantizedPair(original=model, quantized=quantized)


def run(model: ov.Model, data: Dataset) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.stack([compiled(data[i])[0] for i in range(len(data))])


def count(model: ov.Model, kind: str) -> int:
    return sum(node.get_type_name() == kind for node in model.get_ops())


def test_blocks_are_the_layers_with_quantized_operands(pair: QuantizedPair) -> None:
    blocks = find_blocks(pair)
    assert [b.name for b in blocks] == ["stem", "inner", "outer", "left", "right", "head"]
    assert all(b.has_weights for b in blocks)


def test_no_float_blocks_is_the_quantized_model(pair: QuantizedPair, data: Dataset) -> None:
    np.testing.assert_array_equal(run(with_float_blocks(pair, []), data), run(pair.quantized, data))


def test_all_blocks_in_float_is_the_float_model_exactly(pair: QuantizedPair, data: Dataset) -> None:
    model = with_float_blocks(pair, [b.name for b in find_blocks(pair)])
    assert count(model, "FakeQuantize") == 0
    np.testing.assert_array_equal(run(model, data), run(pair.original, data))


def test_every_choice_of_blocks_gives_a_model_between_the_two(pair: QuantizedPair, data: Dataset) -> None:
    reference, blocks = run(pair.original, data), [b.name for b in find_blocks(pair)]
    worst = np.abs(run(pair.quantized, data) - reference).max()
    assert worst > 0
    for size in (1, 3, 5):
        for floats in itertools.islice(itertools.combinations(blocks, size), 4):
            model = with_float_blocks(pair, floats)
            error = np.abs(run(model, data) - reference).max()
            # Taking quantizers out may move one output against the others, but not beyond twice the whole.
            assert error <= 2 * worst, floats
            present = {b.name for b in find_blocks(QuantizedPair(original=pair.original, quantized=model))}
            assert present == set(blocks) - set(floats)


def test_a_float_block_has_the_float_model_s_weights_and_bias(pair: QuantizedPair) -> None:
    model = with_float_blocks(pair, ["inner"])
    for name, index in (("inner", 1), ("inner/bias", 1)):
        left, right = (
            next(n for n in m.get_ops() if n.get_friendly_name() == name) for m in (model, pair.original)
        )
        np.testing.assert_array_equal(
            left.input_value(index).get_node().data, right.input_value(index).get_node().data
        )


def test_a_pooling_between_two_blocks_does_not_hold_a_quantizer_that_nobody_needs(pair: QuantizedPair) -> None:
    model = with_float_blocks(pair, ["left", "right", "outer", "inner", "stem"])
    pool = next(n for n in model.get_ops() if n.get_type_name() == "MaxPool")
    assert pool.input_value(0).get_node().get_type_name() == "Relu"


def test_an_unknown_block_is_named_with_the_nearest(pair: QuantizedPair) -> None:
    with pytest.raises(PlanError, match=r'"iner" is not a quantized layer.*did you mean "inner"'):
        with_float_blocks(pair, ["iner"])


def test_the_model_that_is_handed_in_stays_as_it_was(model: ov.Model, data: Dataset) -> None:
    before = run(model, data)
    quantize(model, QuantizationPlan(subset_size=10), data, device=Device.CPU)
    compress_weights(model, WeightCompressionPlan())
    assert count(model, "FakeQuantize") == 0
    np.testing.assert_array_equal(run(model, data), before)


def test_layers_in_the_ignored_scope_stay_float(model: ov.Model, data: Dataset) -> None:
    plan = QuantizationPlan(subset_size=10, float_layers=("stem", "head"))
    quantized = quantize(model, plan, data, device=Device.CPU)
    blocks = find_blocks(QuantizedPair(original=model, quantized=quantized))
    assert [b.name for b in blocks] == ["inner", "outer", "left", "right"]


def test_nncf_says_nothing_on_stdout(model: ov.Model, data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(model, QuantizationPlan(subset_size=10), data, device=Device.CPU)
    assert capsys.readouterr().out == ""


def test_nncf_sends_no_telemetry() -> None:
    code = (
        "from vinoopt.compression.quantize import import_nncf; import_nncf();"
        "from nncf.telemetry.wrapper import NNCFTelemetry, telemetry;"
        "print(isinstance(telemetry, NNCFTelemetry))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "False"


def test_weights_are_compressed_to_a_quarter(model: ov.Model) -> None:
    compressed = compress_weights(model, WeightCompressionPlan())
    constants = [n for n in compressed.get_ops() if n.get_type_name() == "Constant"]
    assert any(n.get_element_type() in (ov.Type.u8, ov.Type.i8) for n in constants)


def test_what_nncf_refuses_becomes_our_error(model: ov.Model) -> None:
    with pytest.raises(PlanError, match='mode "int7"'):
        compress_weights(model, WeightCompressionPlan(mode="int7"))
    with pytest.raises(PlanError, match='range "guess"'):
        data = from_arrays(np.zeros((12, 3, 16, 16), np.float32), inputs=[SPEC])
        quantize(model, QuantizationPlan(activation_range="guess"), data, device=Device.CPU)
    wrong = from_arrays(
        np.zeros((12, 3, 8, 8), np.float32), inputs=[TensorSpec(name="x", shape=(1, 3, 8, 8), dtype="float32")]
    )
    with pytest.raises(CompressionError, match="NNCF quantization failed"):
        quantize(model, QuantizationPlan(), wrong, device=Device.CPU)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("stem", ("stem",)),
        ("re:.*ft|right", ("left", "right")),
        ("type:MatMul", ("head",)),
    ],
)
def test_the_scope_knows_names_patterns_and_types(model: ov.Model, entry: str, expected: tuple[str, ...]) -> None:
    assert resolve_ignored(model, [entry]) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [("hed", 'did you mean "head"'), ("type:MatMull", 'did you mean "MatMul"'), ("re:(", "not a regular expression")],
)
def test_a_scope_that_matches_nothing_is_refused(model: ov.Model, entry: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_ignored(model, [entry])
