"""Statistics against explicit im2col, unit orders against exhaustive elimination."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as opset

from vinoopt.compression.contractions import (
    bias_vector,
    index_contractions,
    replace_bias,
    replace_weights,
    weight_matrix,
)
from vinoopt.compression.elimination import Reader, nested_damage, order_by_surgery
from vinoopt.compression.groups import find_groups
from vinoopt.compression.im2col import RowReader
from vinoopt.compression.saliency import CRITERIA, collect_statistics, order_units
from vinoopt.errors import DataError, PlanError

RNG = np.random.default_rng(7)


def model_of(output, *parameters):
    return ov.Model([opset.result(output)], list(parameters), "tested")


def run(model, *tensors):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(list(tensors))[0]


def named(node, name):
    node.set_friendly_name(name)
    return node


def conv_model(
    shape, weights, *, groups=False, strides=(1, 1), pads=((0, 0), (0, 0)), dilations=(1, 1), auto="explicit"
):
    x = opset.parameter(shape, np.float32, name="x")
    make = opset.group_convolution if groups else opset.convolution
    node = make(
        x, opset.constant(weights), list(strides), list(pads[0]), list(pads[1]), list(dilations), auto
    )
    return model_of(named(node, "layer"), x)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# --------------------------------------------------------------------------- contractions as matrices

CONVOLUTIONS = {
    "plain": lambda: conv_model([-1, 3, 9, 8], normal(5, 3, 3, 3), pads=((1, 1), (1, 1))),
    "one by one": lambda: conv_model([-1, 6, 5, 7], normal(4, 6, 1, 1)),
    "strided, uneven pads": lambda: conv_model(
        [-1, 2, 11, 9], normal(3, 2, 3, 2), strides=(2, 3), pads=((2, 0), (1, 1))
    ),
    "dilated": lambda: conv_model(
        [-1, 2, 12, 12], normal(3, 2, 3, 3), dilations=(2, 3), pads=((2, 1), (0, 3))
    ),
    "same_upper": lambda: conv_model([-1, 2, 10, 7], normal(3, 2, 4, 3), strides=(2, 2), auto="same_upper"),
    "same_lower": lambda: conv_model([-1, 2, 10, 7], normal(3, 2, 4, 2), strides=(1, 2), auto="same_lower"),
    "valid": lambda: conv_model([-1, 2, 6, 7], normal(3, 2, 2, 3), pads=((1, 1), (1, 1)), auto="valid"),
    "grouped": lambda: conv_model(
        [-1, 6, 7, 7], normal(3, 4, 2, 3, 3), groups=True, pads=((1, 1), (1, 1)), strides=(2, 2)
    ),
}


def transposed():
    x = opset.parameter([-1, 3, 5, 4], np.float32)
    weights = opset.constant(normal(3, 2, 3, 3))
    node = opset.convolution_backprop_data(
        x, weights, [2, 2], None, [1, 0], [0, 1], [1, 2], output_padding=[1, 0]
    )
    return model_of(named(node, "layer"), x)


def matmul(transpose_data, transpose_weights, *, weights_first=False, leading=(-1, 4)):
    data = [*leading, 5, 6] if transpose_data == weights_first else [*leading, 6, 5]
    x = opset.parameter(data, np.float32)
    shape = (3, 6) if transpose_weights != weights_first else (6, 3)
    weights = opset.constant(normal(*shape))
    if weights_first:
        node = opset.matmul(weights, x, transpose_weights, transpose_data)
    else:
        node = opset.matmul(x, weights, transpose_data, transpose_weights)
    return model_of(named(node, "layer"), x)


MATMULS = {
    f"matmul {data:d}{weights:d}{first:d}": lambda d=data, w=weights, f=first: matmul(d, w, weights_first=f)
    for data, weights, first in itertools.product((False, True), repeat=3)
}
ALL = {**CONVOLUTIONS, "transposed": transposed, **MATMULS}


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_rows_times_matrix_are_the_outputs(build):
    model = build()
    shape = [3 if size.is_dynamic else size.get_length() for size in model.input(0).partial_shape]
    tensor = normal(*shape)
    expected = run(model, tensor)
    layer = index_contractions(model)["layer"]
    reader = RowReader(layer)
    assert reader.output_shape(tensor.shape) == expected.shape
    positions = reader.positions(expected.shape, 11, np.random.default_rng(0))
    rows = reader.input_rows(tensor, expected.shape, positions)
    made = np.concatenate(list(rows @ weight_matrix(layer)), axis=1)
    np.testing.assert_allclose(
        made, reader.output_rows(expected, positions), atol=1e-4
    )  # float32, <= 54 terms


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_weights_and_bias_go_back_the_way_they_came(build):
    model = build()
    shape = [2 if size.is_dynamic else size.get_length() for size in model.input(0).partial_shape]
    tensor = normal(*shape)
    before = run(model, tensor)
    layer = index_contractions(model)["layer"]
    assert bias_vector(layer) is None
    bias = normal(layer.groups * layer.outputs).astype(np.float64)
    replace_weights(layer, 2 * weight_matrix(layer))
    replace_bias(layer, bias + 1)
    replace_bias(layer, bias)
    np.testing.assert_allclose(bias_vector(layer), bias, rtol=1e-6)
    axis = -2 if layer.weight_port == 0 else (-1 if layer.type == "MatMul" else 1)
    spread = np.moveaxis(np.broadcast_to(bias, np.moveaxis(before, axis, -1).shape), -1, axis)
    np.testing.assert_allclose(run(model, tensor), 2 * before + spread, atol=1e-4)


def test_a_new_bias_keeps_the_name_of_the_model_output():
    model = conv_model([1, 2, 4, 4], normal(3, 2, 1, 1))
    model.output(0).set_names({"scores"})
    replace_bias(index_contractions(model)["layer"], np.ones(3))
    assert model.output(0).get_names() == {"scores"}


def test_a_shared_weight_constant_is_left_to_the_others():
    x = opset.parameter([1, 4], np.float32)
    weights = opset.constant(normal(4, 4))
    first = named(opset.matmul(x, weights, False, False), "first")
    second = named(opset.matmul(first, weights, False, False), "second")
    model = model_of(second, x)
    layers = index_contractions(model)
    kept = weight_matrix(layers["second"])
    replace_weights(layers["first"], np.zeros((1, 4, 4)))
    np.testing.assert_array_equal(weight_matrix(layers["first"]), np.zeros((1, 4, 4)))
    np.testing.assert_array_equal(weight_matrix(layers["second"]), kept)


def test_weights_behind_a_conversion_are_found_and_stay_in_their_format():
    x = opset.parameter([1, 4], np.float32)
    weights = opset.convert(opset.constant(normal(4, 3).astype(np.float16)), "f32")
    model = model_of(named(opset.matmul(x, weights, False, False), "layer"), x)
    layer = index_contractions(model)["layer"]
    wanted = np.round(normal(1, 4, 3) * 16) / 16  # exact in float16
    replace_weights(layer, wanted)
    np.testing.assert_array_equal(weight_matrix(layer), wanted)
    assert [node.get_element_type() for node in model.get_ops() if node.get_type_name() == "Constant"] == [
        ov.Type.f16
    ]


# --------------------------------------------------------------------------- statistics


def unfolded(tensor, kernel, strides, dilations, pads):
    """im2col by plain loops: [samples * places, channels * taps]."""
    (top, left), (bottom, right) = pads
    padded = np.pad(tensor, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    rows = []
    for sample in padded:
        for y in range(0, sample.shape[1] - reach[0] + 1, strides[0]):
            for x in range(0, sample.shape[2] - reach[1] + 1, strides[1]):
                patch = sample[:, y : y + reach[0] : dilations[0], x : x + reach[1] : dilations[1]]
                rows.append(patch.ravel())
    return np.array(rows)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_moments_equal_those_of_an_explicit_unfold(data):
    draw = data.draw

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, strides, dilations, pads = pair(1, 3), pair(1, 3), pair(1, 2), (pair(0, 2), pair(0, 2))
    groups, channels = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    weights = normal(groups, 2, channels, *kernel) if groups > 1 else normal(2, channels, *kernel)
    model = conv_model(
        [-1, groups * channels, 8, 7],
        weights,
        groups=groups > 1,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    samples = [{"x": normal(1, groups * channels, 8, 7)} for _ in range(5)]
    moments = collect_statistics(model, ["layer"], samples, rows_per_sample=1000)["layer"]
    everything = np.concatenate([sample["x"] for sample in samples])
    for group in range(groups):
        part = everything[:, group * channels : (group + 1) * channels]
        rows = unfolded(part, kernel, strides, dilations, pads)
        assert moments.rows == len(rows)
        np.testing.assert_allclose(moments.mean[group], rows.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(moments.second[group], rows.T @ rows / len(rows), atol=1e-6)
        np.testing.assert_allclose(moments.covariance(group), np.cov(rows.T, bias=True), atol=1e-6)


def chain():
    """conv -> relu -> conv -> relu -> flatten -> matmul, with biases; batch left open."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        values = rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
        return opset.constant(values.astype(np.float32))

    x = opset.parameter([-1, 3, 8, 8], np.float32, name="x")
    x.output(0).set_names({"x"})
    first = named(opset.convolution(x, draw(12, 3, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1]), "first")
    hidden = opset.relu(opset.add(first, draw(1, 12, 1, 1)))
    second = named(opset.convolution(hidden, draw(8, 12, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1]), "second")
    pooled = opset.relu(opset.add(second, draw(1, 8, 1, 1)))
    flat = opset.reshape(pooled, opset.constant(np.array([0, -1])), True)
    head = named(opset.matmul(flat, draw(5, 8 * 16), False, True), "head")
    return model_of(opset.add(head, draw(1, 5)), x)


def chain_samples(count=24, seed=5):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def test_memory_bound_and_batch_change_the_passes_but_not_the_moments():
    samples = chain_samples()
    reports = []
    loose = collect_statistics(chain(), ["second", "head"], samples, seed=1)
    tight = collect_statistics(
        chain(),
        ["second", "head"],
        samples,
        seed=1,
        memory_bytes=16 * 128**2,
        progress=lambda *done: reports.append(done),
    )
    for layer in ("second", "head"):
        np.testing.assert_allclose(loose[layer].second, tight[layer].second, rtol=1e-6, atol=1e-9)
    assert reports[-1] == (48, 48)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_same_seed_same_rows_other_seed_other_rows():
    def collect(seed):
        statistics = collect_statistics(chain(), ["second"], chain_samples(), rows_per_sample=4, seed=seed)
        return statistics["second"]

    first, again, other = (collect(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.second, again.second)
    assert first.rows == other.rows == 24 * 4
    assert not np.array_equal(first.second, other.second)


def test_samples_may_come_from_a_generator():
    listed = collect_statistics(chain(), ["head"], chain_samples())["head"]
    streamed = collect_statistics(chain(), ["head"], (sample for sample in chain_samples()))["head"]
    np.testing.assert_array_equal(listed.second, streamed.second)


def test_a_constant_that_carries_the_batch_is_respected():
    x = opset.parameter([-1, 4], np.float32)
    x.output(0).set_names({"x"})
    # [n, 4] -> [1, n, 4] -> the mean over axis 1 mixes samples of one call
    mixed = opset.reduce_mean(
        opset.reshape(x, opset.constant(np.array([1, -1, 4])), False), opset.constant(np.array([1])), True
    )
    spread = opset.add(x, opset.reshape(mixed, opset.constant(np.array([1, 4])), False))
    model = model_of(named(opset.matmul(spread, opset.constant(normal(4, 3)), False, False), "layer"), x)
    samples = [{"x": normal(1, 4)} for _ in range(6)]
    moments = collect_statistics(model, ["layer"], samples)["layer"]
    rows = 2 * np.concatenate([sample["x"] for sample in samples])
    np.testing.assert_allclose(moments.mean[0], rows.mean(axis=0), atol=1e-6)


def test_what_does_not_fit_the_memory_is_kept_as_sampled_rows():
    samples = chain_samples(200)
    memory = 4 * 128 * 300  # 300 rows of the head; its moment would take 16 * 128^2
    tight = collect_statistics(chain(), ["second", "head"], samples, seed=1, memory_bytes=memory)
    exact = collect_statistics(chain(), ["second", "head"], samples, seed=1)
    assert tight["head"].second is None
    assert tight["head"].sampled.shape == (1, 200, 128)
    np.testing.assert_allclose(tight["head"].covariance(), exact["head"].covariance(), atol=1e-5)
    # the other layer has 16 rows a sample: a part of them is drawn
    assert tight["second"].rows == 3200
    assert tight["second"].sampled.shape == (1, memory // (4 * 108), 108)
    np.testing.assert_allclose(tight["second"].mean, exact["second"].mean, atol=1e-6)
    apart = np.linalg.norm(tight["second"].covariance() - exact["second"].covariance(), 2)
    assert 0 < apart < 2 * np.linalg.norm(exact["second"].covariance(), 2)


def test_what_cannot_be_addressed_is_refused():
    with pytest.raises(PlanError, match='did you mean "second"'):
        collect_statistics(chain(), ["secnd"], chain_samples(2))
    depthwise = conv_model([-1, 4, 5, 5], normal(4, 1, 1, 3, 3), groups=True)
    with pytest.raises(PlanError, match="depthwise"):
        collect_statistics(depthwise, ["layer"], [{"x": normal(1, 4, 5, 5)}])
    with pytest.raises(DataError, match="no samples"):
        collect_statistics(chain(), ["second"], [])
    with pytest.raises(DataError, match="no value for input"):
        collect_statistics(chain(), ["second"], [{"y": normal(1, 3, 8, 8)}])
    with pytest.raises(PlanError, match="no statistics"):
        collect_statistics(chain(), ["second"], chain_samples(2))["head"]


# --------------------------------------------------------------------------- order


def random_reader(rng, *, units, taps, fixed, outputs, damping=1e-3):
    columns = units * taps + fixed
    mixing = rng.standard_normal((columns, columns)) * (0.1 + rng.random(columns))
    rows = rng.standard_normal((3 * columns, columns)) @ mixing
    places = rng.permutation(columns)
    return Reader(
        covariance=rows.T @ rows / len(rows),
        weights=rng.standard_normal((columns, outputs)) * (0.05 + rng.random((columns, 1))),
        unit_columns=tuple(places[unit * taps : (unit + 1) * taps] for unit in range(units)),
        damping=damping,
    )


def refit_loss(reader, gone):
    """Loss of the best refit without the units in `gone`, relative; straight from the normal equations."""
    matrix = reader.covariance + reader.damping * np.mean(np.diag(reader.covariance)) * np.eye(
        len(reader.weights)
    )
    removed = np.concatenate([reader.unit_columns[unit] for unit in gone])
    kept = np.setdiff1d(np.arange(len(matrix)), removed)
    schur = matrix[np.ix_(removed, removed)] - matrix[np.ix_(removed, kept)] @ np.linalg.solve(
        matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, removed)]
    )
    return np.trace(reader.weights[removed].T @ schur @ reader.weights[removed]) / reader.variance


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    taps=st.integers(1, 3),
    fixed=st.sampled_from([0, 4]),
    readers=st.integers(1, 2),
)
def test_surgery_takes_the_cheapest_unit_at_every_step(seed, taps, fixed, readers):
    rng = np.random.default_rng(seed)
    pool = [random_reader(rng, units=7, taps=taps, fixed=fixed, outputs=3) for _ in range(readers)]
    order = order_by_surgery(pool)
    assert sorted(order) == list(range(7))
    losses = [0.0]
    for step, unit in enumerate(order):
        gone = list(order[:step])
        costs = {u: sum(refit_loss(r, [*gone, u]) for r in pool) for u in range(7) if u not in gone}
        assert costs[unit] <= min(costs.values()) * (1 + 1e-6)
        losses.append(costs[unit])
    damage = sum(nested_damage(reader, order) for reader in pool)
    np.testing.assert_allclose(damage[::-1], losses, rtol=1e-6, atol=1e-9)


def test_surgery_is_exact_across_its_delayed_updates():
    reader = random_reader(
        np.random.default_rng(0), units=120, taps=3, fixed=7, outputs=4
    )  # 360 columns: two settlings
    order = order_by_surgery([reader])
    damage = nested_damage(reader, order)
    assert (np.diff(damage) <= 1e-12).all()
    for kept in (100, 60, 20, 3):
        assert damage[kept] == pytest.approx(refit_loss(reader, list(order[: 120 - kept])), rel=1e-6)
    for step in (90, 110):  # later than the first settling
        gone = list(order[:step])
        costs = {u: refit_loss(reader, [*gone, u]) for u in range(120) if u not in gone}
        assert min(costs, key=costs.get) == order[step]


def test_a_reader_that_does_not_see_a_unit_is_not_asked_about_it():
    rng = np.random.default_rng(1)
    reader = random_reader(rng, units=4, taps=2, fixed=0, outputs=3)
    blind = Reader(
        covariance=np.eye(2),
        weights=np.ones((2, 1)),
        unit_columns=(*[np.empty(0, int)] * 3, np.array([0, 1])),
        damping=1e-3,
    )
    order = order_by_surgery([reader, blind])
    assert order[3] == 3  # all that `blind` reads
    assert order[0] == min(range(3), key=lambda unit: refit_loss(reader, [unit]))


def test_a_reader_whose_outputs_never_move_has_no_say():
    reader = random_reader(np.random.default_rng(2), units=4, taps=2, fixed=0, outputs=3)
    still = dataclasses.replace(reader, covariance=np.zeros((8, 8)))
    assert order_by_surgery([reader, still]).tolist() == order_by_surgery([reader]).tolist()
    assert nested_damage(still, np.arange(4)).tolist() == [0.0] * 5


@pytest.mark.parametrize("criterion", CRITERIA)
def test_orders_are_whole_and_their_damage_falls_with_width(criterion):
    model = chain()
    coupling = find_groups(model)
    statistics = collect_statistics(model, ["second", "head"], chain_samples(64))
    orders = order_units(model, coupling, statistics, criterion=criterion)
    assert {name: len(order.order) for name, order in orders.items()} == {"first": 12, "second": 8}
    for order in orders.values():
        units = len(order.order)
        assert sorted(order.order) == list(range(units))
        assert order.damage.shape == (units + 1,)
        assert order.damage[units] == 0
        assert (np.diff(order.damage) <= 1e-9).all()
        assert order.kept(units) == tuple(range(units))
        assert set(order.kept(3)) == set(order.order[-3:])


@pytest.mark.parametrize("criterion", ["obs", "energy"])
def test_a_unit_that_never_moves_goes_first(criterion):
    model = chain()
    layer = index_contractions(model)["second"]
    weights, bias = weight_matrix(layer), bias_vector(layer)
    weights[:, :, 5] = 0  # its relu is a constant, which the bias of the head can hold
    bias[5] = 30.0
    replace_weights(layer, weights)
    replace_bias(layer, bias)
    statistics = collect_statistics(model, ["second", "head"], chain_samples(64))
    order = order_units(model, find_groups(model), statistics, criterion=criterion, ridge=1e-8)["second"]
    assert order.order[0] == 5
    assert order.damage[7] < 1e-6


def test_surgery_finds_the_duplicate_that_energy_cannot_see():
    model = chain()
    layer = index_contractions(model)["first"]
    weights, bias = weight_matrix(layer), bias_vector(layer)
    weights[:, :, 2] = 3 * weights[:, :, 9]
    bias[2] = 3 * bias[9]
    replace_weights(layer, weights)
    replace_bias(layer, bias)
    statistics = collect_statistics(model, ["second", "head"], chain_samples(64))
    coupling = find_groups(model)
    order = order_units(model, coupling, statistics, criterion="obs", ridge=1e-6)["first"]
    assert order.order[0] in (2, 9)
    assert order.damage[11] < 1e-4


def test_reduced_statistics_bound_the_damage_from_above():
    samples = chain_samples(400)
    model, coupling = chain(), find_groups(chain())
    full = collect_statistics(model, ["second", "head"], samples, seed=1)
    exact = order_units(model, coupling, full, criterion="energy", ridge=1e-6)["second"]
    rows = collect_statistics(model, ["second", "head"], samples, seed=1, memory_bytes=16 * 128**2 - 1)
    assert rows["head"].second is None
    bound = order_units(model, coupling, rows, criterion="obs", ridge=1e-6)["second"]
    exact_at = {frozenset(exact.kept(width)): exact.damage[width] for width in range(9)}
    shared = [width for width in range(9) if frozenset(bound.kept(width)) in exact_at]
    assert {0, 8} <= set(shared)
    for width in shared:
        assert bound.damage[width] >= exact_at[frozenset(bound.kept(width))] - 1e-4


def test_an_unknown_criterion_is_refused():
    with pytest.raises(PlanError, match='did you mean "energy"'):
        order_units(
            chain(),
            find_groups(chain()),
            collect_statistics(chain(), ["head"], chain_samples(2)),
            criterion="enrgy",
        )
