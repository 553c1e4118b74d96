"""Which samples may run in one call, and which graphs mix them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from vinoopt.compression.activations import CALL_BYTES, iterate_calls, open_batch, samples_per_call
from vinoopt.compression.regression import PairedSums, solve

Sample = dict[str, np.ndarray]


def graph(make: Callable[[ov.Node], ov.Node], *, batch: int = 1) -> ov.Model:
    x = ops.parameter([batch, 4, 6], np.float32, name="x")
    x.output(0).set_names({"x"})
    return ov.Model([make(x)], [x])


def product(x: ov.Node) -> ov.Node:
    weights = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    return ops.relu(ops.matmul(x, ops.constant(weights), False, False))


def threshold(x: ov.Node) -> ov.Node:
    return ops.greater(product(x), ops.constant(np.float32(0.1)))


def by_the_largest(x: ov.Node) -> ov.Node:
    """Of all samples of a call: they must not meet."""
    return ops.divide(x, ops.reduce_max(x, ops.constant(np.array([0, 1, 2])), True))


def flattened(x: ov.Node) -> ov.Node:
    """The batch is in a constant."""
    return ops.reshape(product(x), ops.constant(np.array([1, 24])), False)


def over_the_first_axis(x: ov.Node) -> ov.Node:
    return ops.softmax(x, 0)


def samples(count: int) -> list[Sample]:
    """All of one largest value, as saturated images are."""
    found = np.random.default_rng(1).uniform(0, 1, (count, 1, 4, 6)).astype(np.float32)
    found[:, 0, 0, 0] = 1.0
    return [{"x": each} for each in found]


def lengths(model: ov.Model, *, also: tuple[ov.Model, ...] = ()) -> list[int]:
    return [len(call["x"]) for call in iterate_calls(model, samples(5), size=3, also=also)]


@pytest.mark.parametrize("make", [product, threshold])
def test_a_batch_that_nothing_hangs_on_is_opened(make: Callable[[ov.Node], ov.Node]) -> None:
    model = graph(make)
    assert lengths(model) == [1, 1, 1, 1, 1]
    assert open_batch(model)
    assert lengths(model) == [3, 2]


@pytest.mark.parametrize("make", [by_the_largest, flattened, over_the_first_axis])
def test_samples_that_would_meet_stay_apart(make: Callable[[ov.Node], ov.Node]) -> None:
    model = graph(make)
    open_batch(model)
    assert lengths(model) == [1, 1, 1, 1, 1]


def test_all_models_of_a_walk_have_to_keep_samples_apart() -> None:
    free, mixing = graph(product), graph(over_the_first_axis)
    assert open_batch(free, mixing)
    assert lengths(free) == [3, 2]
    assert lengths(free, also=(mixing,)) == [1, 1, 1, 1, 1]


def test_a_model_whose_doors_disagree_is_left_alone() -> None:
    x, y = (ops.parameter(shape, np.float32, name=name) for name, shape in (("x", [1, 6]), ("y", [2, 6])))
    model = ov.Model([ops.add(x, y)], [x, y])
    assert not open_batch(model)
    assert [list(port.get_shape()) for port in model.inputs] == [[1, 6], [2, 6]]


def test_large_tensors_run_a_few_samples_at_a_time() -> None:
    x = ops.parameter([1, CALL_BYTES // 4 // 5], np.float32)
    assert samples_per_call([x.output(0)], most=16) == 5
    assert samples_per_call([x.output(0)] * 8, most=16) == 1
    assert samples_per_call([], most=16) == 16


def test_many_small_systems_are_solved_as_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(3, 200, 9)), rng.normal(size=(3, 200, 2))
    x[2] = 0.1  # a channel that never moves, but for rounding
    sums = PairedSums.empty(3, 9, 2)
    sums.add(x, e)
    change, shift = sums.solve(3.0)
    for group in (0, 1):
        covariance = np.cov(x[group].T, bias=True)
        cross = (x[group] - x[group].mean(0)).T @ (e[group] - e[group].mean(0)) / 200
        np.testing.assert_allclose(change[group], solve(covariance, cross, 3.0 * 9 / 200), rtol=1e-6)
    assert not change[2].any()
    np.testing.assert_allclose(shift[2], e[2].mean(0))
