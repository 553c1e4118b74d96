"""The first layer that departs is found and named, by real arithmetic on a real device."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.bench import Sample
from vinoopt.tuning import SettingState, TuneConfig, TuneTask, Variant, first_departure, tune

BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def named(node: ov.Node, name: str) -> ov.Node:
    node.set_friendly_name(name)
    return node


def network(offset: float = 0.0, *, narrow: int | None = None) -> ov.Model:
    """Five matrix products; `offset` is added behind the third and taken away by the fourth.

    Where it is large, a format of 8 bits of mantissa loses the signal. Behind product `narrow` lies a quantizer
    whose range is too small for the values.
    """
    rng = np.random.default_rng(0)
    x = ops.parameter([1, 32], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    value: ov.Node = x
    for number in range(1, 6):
        weights = rng.normal(size=(32, 32)).astype(np.float32) / np.float32(6)
        value = named(ops.matmul(value, weights, False, False), f"product{number}")
        if number == narrow:
            value = named(ops.fake_quantize(value, -0.1, 0.1, -0.1, 0.1, 256), "quantizer")
        if number == 3:
            value = named(ops.add(value, np.full((1, 32), offset, np.float32)), "offset")
        if number == 4:
            value = named(ops.subtract(value, offset * weights.sum(0, keepdims=True)), "centred")
        value = named(ops.relu(value), f"relu{number}")
    return ov.Model([value], [x], "chain")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 32)).astype(np.float32)} for _ in range(12)]


def test_equal_models_do_not_depart(samples: list[Sample]) -> None:
    model = network()
    assert first_departure(Variant(model=model), Variant(model=model), samples) is None


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_a_layer_that_half_precision_ruins_is_named(samples: list[Sample]) -> None:
    model = network(offset=2000.0)
    found = first_departure(Variant(model=model), Variant(model=model, properties=BF16), samples)
    assert found is not None
    assert found.layer in ("offset", "relu3", "product4", "centred")
    assert found.before <= found.limit < found.error
    assert found.layer in found.sentence


def test_a_quantizer_that_saturates_is_found_in_a_rewritten_graph(samples: list[Sample]) -> None:
    found = first_departure(Variant(model=network()), Variant(model=network(narrow=2)), samples)
    assert found is not None
    assert (found.layer, found.type) == ("relu2", "Relu")  # the first behind the quantizer that both graphs have
    assert found.before < 1e-3 < 0.5 < found.error


def test_values_that_are_not_finite_are_named(samples: list[Sample]) -> None:
    candidate = network()
    node = next(op for op in candidate.get_ops() if op.get_friendly_name() == "product4")
    node.input(1).replace_source_output(ops.constant(np.full((32, 32), 3e38, np.float32)).output(0))
    found = first_departure(Variant(model=network()), Variant(model=candidate), samples)
    assert found is not None
    assert found.layer == "product4"
    assert found.error == np.inf
    assert "not finite" in found.sentence


def test_a_changed_weight_is_found_wherever_it_lies(samples: list[Sample]) -> None:
    for number in range(1, 6):
        reference, candidate = network(), network()
        node = next(op for op in candidate.get_ops() if op.get_friendly_name() == f"product{number}")
        other = ops.constant(np.random.default_rng(number).normal(size=(32, 32)).astype(np.float32))
        node.input(1).replace_source_output(other.output(0))
        found = first_departure(Variant(model=reference), Variant(model=candidate), samples)
        assert found is not None
        assert found.layer == f"product{number}"


def test_a_branch_that_departs_is_told_from_one_that_does_not(samples: list[Sample]) -> None:
    def branches(scale: float) -> ov.Model:
        rng = np.random.default_rng(3)
        x = ops.parameter([1, 32], np.float32, name="x")
        x.output(0).tensor.set_names({"x"})
        weights = [rng.normal(size=(32, 32)).astype(np.float32) for _ in range(2)]
        left = named(ops.tanh(named(ops.matmul(x, weights[0], False, False), "left")), "left tanh")
        right = named(ops.matmul(x, weights[1] * np.float32(scale), False, False), "right")
        return ov.Model([named(ops.add(left, named(ops.tanh(right), "right tanh")), "sum")], [x], "branches")

    found = first_departure(Variant(model=branches(1.0)), Variant(model=branches(1.5)), samples)
    assert found is not None
    assert found.layer == "right"


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_tuning_names_the_layer_of_a_refused_setting(samples: list[Sample]) -> None:
    model = network(offset=2000.0)
    exact = TuneConfig(seconds=0.001)
    result = tune(TuneTask(model=model, samples=samples), config=exact)
    assert any("first departs at" in warning for warning in result.warnings) or any(
        trial.state is SettingState.REFUSED and "first departs at" in trial.reason for trial in result.trials
    )
