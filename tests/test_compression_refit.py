"""Closed forms against least squares; sequential refit and bias correction on small and real networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as opset

from vinoopt.compression.activations import ActivationStream, Part, iterate_calls
from vinoopt.compression.contractions import (
    bias_vector,
    index_contractions,
    replace_bias,
    replace_weights,
    weight_matrix,
)
from vinoopt.compression.groups import find_groups
from vinoopt.compression.refit import (
    RIDGES,
    Aims,
    RefitSettings,
    best_fit,
    closed_form,
    correct_bias,
    mean_outputs,
    refit_local,
    refit_sequential,
)
from vinoopt.compression.regression import EXACT_COLUMNS, PairedSums
from vinoopt.compression.saliency import Moments, collect_statistics, order_units
from vinoopt.compression.surgery import apply_pruning
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import GroupWidth


def run(model, samples):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(sample)[0] for sample in samples])


def weights_of(rng, *shape):
    fan_in = np.prod(shape[1:]) or 1
    return opset.constant((rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32))


def conv(rng, x, channels, name, *, kernel=3, stride=1, inputs, bias=True):
    pad = [kernel // 2] * 2
    node = opset.convolution(
        x, weights_of(rng, channels, inputs, kernel, kernel), [stride] * 2, pad, pad, [1, 1]
    )
    node.set_friendly_name(name)
    return opset.add(node, weights_of(rng, 1, channels, 1, 1)) if bias else node


def residual_net(seed=0, *, batch=-1, bias=True, down=True):
    """stem, two residual blocks (the second with a strided shortcut convolution), pooled head."""
    rng = np.random.default_rng(seed)
    x = opset.parameter([batch, 3, 10, 10], np.float32)
    x.output(0).set_names({"x"})
    stem = opset.relu(conv(rng, x, 12, "stem", inputs=3))
    inner = opset.relu(conv(rng, stem, 16, "a1", inputs=12, bias=bias))
    block = opset.relu(opset.add(conv(rng, inner, 12, "a2", inputs=16, bias=bias), stem))
    inner = opset.relu(conv(rng, block, 20, "b1", stride=2, inputs=12))
    branch = conv(rng, inner, 16, "b2", inputs=20)
    if down:
        branch = opset.add(branch, conv(rng, block, 16, "down", kernel=1, stride=2, inputs=12))
    pooled = opset.reduce_mean(opset.relu(branch), opset.constant(np.array([2, 3])), False)
    head = opset.matmul(pooled, weights_of(rng, 7, 16), False, True)
    head.set_friendly_name("head")
    return ov.Model([opset.result(opset.add(head, weights_of(rng, 1, 7)))], [x], "residual")


def samples_of(count, seed=1, size=1):
    rng = np.random.default_rng(seed)
    smooth = rng.standard_normal((count, 3, 4, 4)).astype(np.float32)
    images = np.kron(smooth, np.ones((1, 1, 3, 3), np.float32))[:, :, :10, :10]
    images = images + 0.3 * rng.standard_normal(images.shape).astype(np.float32)
    return [{"x": images[start : start + size]} for start in range(0, count, size)]


def pruned_net(model, keep=0.6, calibration=None):
    coupling = find_groups(model)
    layers = sorted({name for group in coupling.groups for name in group.consumers})
    statistics = collect_statistics(model, layers, calibration or samples_of(96))
    orders = order_units(model, coupling, statistics)
    widths = [
        GroupWidth(group=group.name, kept=orders[group.name].kept(round(keep * group.units)))
        for group in coupling.groups
    ]
    return apply_pruning(model, coupling, widths), statistics


def error_of(model, reference, samples):
    wanted = run(reference, samples)
    return float(np.square(run(model, samples) - wanted).mean() / wanted.var())


# --------------------------------------------------------------------------- closed form


def moments_of(rows):
    rows = rows.astype(np.float64)
    return Moments(rows=len(rows), mean=rows.mean(axis=0)[None], second=(rows.T @ rows / len(rows))[None])


def sampled_moments_of(rows):
    return Moments(rows=len(rows), mean=rows.mean(axis=0)[None], second=None, sampled=rows[None])


@pytest.mark.parametrize("make", [moments_of, sampled_moments_of])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.integers(0, 8))
def test_without_a_ridge_it_is_least_squares(make, seed, kept):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((60, 9)) @ rng.standard_normal((9, 9)) + 3 * rng.standard_normal(9)
    weights = rng.standard_normal((9, 4))
    columns = np.sort(rng.permutation(9)[:kept])
    refit = closed_form(make(rows), weights, columns, ridge=0)
    design = np.concatenate([rows[:, columns], np.ones((60, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(design, rows @ weights, rcond=None)
    made = rows[:, columns] @ refit.weights + refit.bias_shift
    np.testing.assert_allclose(made, design @ expected, atol=1e-4 * np.abs(rows @ weights).max())
    centred = rows @ weights - (rows @ weights).mean(axis=0)
    loss = np.square(rows @ weights - design @ expected).sum() / np.square(centred).sum()
    assert refit.error == pytest.approx(loss, rel=1e-3, abs=1e-7)


def test_a_ridge_pulls_toward_the_weights_as_they_were():
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((6, 3))
    columns = np.array([0, 2, 3])
    distance = [
        np.abs(closed_form(moments_of(rows), weights, columns, ridge=ridge).weights - weights[columns]).max()
        for ridge in (0, 1, 10, 1e3, 1e9)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-6


def test_rows_and_moments_agree_under_a_ridge():
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((50, 6)), rng.standard_normal((6, 3))
    first, second = (
        closed_form(make(rows), weights, np.array([1, 2, 5]), ridge=3)
        for make in (moments_of, sampled_moments_of)
    )
    np.testing.assert_allclose(first.weights, second.weights, atol=1e-9)
    assert first.error == pytest.approx(second.error)


def test_what_is_a_combination_of_the_kept_columns_is_recovered_exactly():
    rng = np.random.default_rng(2)
    base = rng.standard_normal((200, 5))
    rows = np.concatenate([base, base @ rng.standard_normal((5, 4)) + 2.0], axis=1)
    refit = closed_form(moments_of(rows), rng.standard_normal((9, 3)), np.arange(5), ridge=0)
    assert refit.error < 1e-12


# --------------------------------------------------------------------------- local refit


def linear_net(rng):
    """conv -> conv with a first layer whose channels 0..3 are combinations of channels 4..9."""
    x = opset.parameter([-1, 3, 10, 10], np.float32)
    x.output(0).set_names({"x"})
    node = conv(rng, x, 10, "first", inputs=3)
    layer = conv(rng, node, 6, "second", kernel=1, inputs=10, bias=False)
    model = ov.Model([opset.result(layer)], [x], "linear")
    first = index_contractions(model)["first"]
    mixing = rng.standard_normal((6, 4))
    weights, bias = weight_matrix(first), bias_vector(first)
    weights[0][:, :4], bias[:4] = weights[0][:, 4:] @ mixing, bias[4:] @ mixing + 1.5
    replace_weights(first, weights)
    replace_bias(first, bias)
    return model


def test_local_refit_restores_a_linear_net_whose_removed_channels_were_redundant():
    model, samples = linear_net(np.random.default_rng(4)), samples_of(20)
    pruned = apply_pruning(model, find_groups(model), [GroupWidth(group="first", kept=tuple(range(4, 10)))])
    statistics = collect_statistics(model, ["second"], samples)
    assert error_of(pruned.model, model, samples) > 0.1
    assert error_of(refit_local(model, pruned, statistics, ridge=0), model, samples) < 1e-8
    assert error_of(refit_sequential(model, pruned, samples), model, samples) < 1e-3
    assert (
        error_of(refit_sequential(model, pruned, samples, settings=RefitSettings(ridge=0)), model, samples)
        < 1e-8
    )


def test_mean_outputs_stand_for_a_layer_that_has_nothing_to_read():
    model = residual_net()
    statistics = collect_statistics(model, ["a2", "head"], samples_of(40), rows_per_sample=100)
    means = mean_outputs(model, statistics)
    layer = index_contractions(model)["a2"]
    part = Part([layer.node.output(0)], model.get_parameters())
    outputs = np.concatenate([part.run([sample["x"]])[0] for sample in samples_of(40)])
    np.testing.assert_allclose(means["a2"], outputs.mean(axis=(0, 2, 3)), atol=1e-5)


def grouped_net(rng):
    """conv -> grouped conv that reads single channels away inside its groups is not pruned, conv behind it is."""
    x = opset.parameter([-1, 3, 10, 10], np.float32)
    x.output(0).set_names({"x"})
    first = opset.relu(conv(rng, x, 8, "first", inputs=3))
    node = opset.group_convolution(first, weights_of(rng, 8, 1, 1, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
    node.set_friendly_name("depthwise")
    second = conv(rng, opset.relu(node), 5, "second", kernel=1, inputs=8)
    return ov.Model([opset.result(second)], [x], "grouped")


def test_a_depthwise_layer_in_between_is_passed():
    model, samples = grouped_net(np.random.default_rng(1)), samples_of(48)
    pruned, statistics = pruned_net(model, keep=0.4, calibration=samples)
    assert [cut.name for cut in pruned.consumers] == ["second"]
    plain = error_of(pruned.model, model, samples)
    assert error_of(refit_local(model, pruned, statistics), model, samples) < 0.9 * plain
    assert error_of(refit_sequential(model, pruned, samples), model, samples) < 0.9 * plain


def test_a_grouped_layer_that_reads_channels_away_is_refitted_group_by_group():
    rng, samples = np.random.default_rng(6), samples_of(64)
    x = opset.parameter([-1, 3, 10, 10], np.float32)
    x.output(0).set_names({"x"})
    first = opset.relu(conv(rng, x, 12, "first", inputs=3))
    second = opset.group_convolution(first, weights_of(rng, 2, 4, 6, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
    second.set_friendly_name("second")
    model = ov.Model([opset.result(second)], [x], "grouped")
    pruned, statistics = pruned_net(model, keep=0.5, calibration=samples)
    assert [(cut.name, cut.kept_columns.size) for cut in pruned.consumers] == [("second", 6)]
    plain = error_of(pruned.model, model, samples)
    assert error_of(refit_local(model, pruned, statistics), model, samples) < 0.8 * plain
    assert error_of(refit_sequential(model, pruned, samples), model, samples) < 0.8 * plain


# --------------------------------------------------------------------------- sequential refit


@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"down": False}, {"batch": 1}], ids=str)
def test_each_refit_is_better_than_the_one_before(kind):
    model, calibration, fresh = residual_net(**kind), samples_of(96), samples_of(60, seed=9)
    pruned, statistics = pruned_net(model, calibration=calibration)
    local = refit_local(model, pruned, statistics)
    sequential = refit_sequential(model, dataclasses.replace(pruned, model=local), calibration)
    plain, after_local, after_both = (
        error_of(each, model, fresh) for each in (pruned.model, local, sequential)
    )
    assert after_local < 0.9 * plain
    assert after_both < after_local


def test_the_residual_term_helps_where_a_block_feeds_an_add():
    model, calibration, fresh = residual_net(), samples_of(160), samples_of(60, seed=9)
    pruned, _ = pruned_net(model, keep=0.5, calibration=calibration)
    with_term, without = (
        error_of(
            refit_sequential(model, pruned, calibration, settings=RefitSettings(residual=residual)),
            model,
            fresh,
        )
        for residual in (True, False)
    )
    assert with_term < without


def test_inputs_are_left_alone():
    model = residual_net()
    pruned, _ = pruned_net(model)
    before = [run(each, samples_of(4)) for each in (model, pruned.model)]
    refit_sequential(model, pruned, samples_of(24))
    after = [run(each, samples_of(4)) for each in (model, pruned.model)]
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)


def test_same_seed_same_weights():
    model = residual_net()
    pruned, _ = pruned_net(model)
    settings_ = RefitSettings(rows_per_sample=8, seed=3)
    first, second = (refit_sequential(model, pruned, samples_of(24), settings=settings_) for _ in range(2))
    for one, other in zip(first.get_ordered_ops(), second.get_ordered_ops(), strict=True):
        if one.get_type_name() == "Constant":
            np.testing.assert_array_equal(one.get_data(), other.get_data())


@pytest.mark.parametrize("memory", [1 << 20, 30_000, 0])
def test_what_was_aimed_at_before_gives_the_same_weights_without_the_float_model(memory):
    model, samples = residual_net(), samples_of(24)
    first, second = pruned_net(model)[0], pruned_net(model, keep=0.8)[0]
    aims = Aims(memory_bytes=memory)
    refit_sequential(model, first, samples, aims=aims)
    again = refit_sequential(model, second, samples, aims=aims)
    np.testing.assert_array_equal(run(again, samples), run(refit_sequential(model, second, samples), samples))
    made = [0]

    def counted():
        made[0] += 1
        yield np.ones((4, 4), np.float32)

    kept = Aims(memory_bytes=memory)
    for _ in range(2):
        assert sum(each.sum() for each in kept.of(("key",), counted)) == 16
    assert made == [1 if memory else 2]


def test_little_memory_changes_the_effort_but_not_the_result():
    model, samples = residual_net(), samples_of(24)
    pruned, _ = pruned_net(model)
    loose, tight = (
        run(refit_sequential(model, pruned, samples, settings=RefitSettings(memory_bytes=memory)), samples)
        for memory in (1 << 30, 1)
    )
    np.testing.assert_allclose(loose, tight, atol=1e-4)


def test_no_time_leaves_the_weights_and_progress_counts_layers():
    model, samples = residual_net(), samples_of(10)
    pruned, _ = pruned_net(model)
    late = refit_sequential(model, pruned, samples, settings=RefitSettings(time_limit_s=0))
    np.testing.assert_allclose(run(late, samples), run(pruned.model, samples), atol=1e-5)
    for behind in (True, False):
        seen: list[tuple[int, int]] = []
        refit_sequential(
            model, pruned, samples, settings=RefitSettings(behind=behind),
            progress=lambda *counts, seen=seen: seen.append(counts),
        )
        total = seen[-1][1]
        assert seen == [(done, total) for done in range(1, total + 1)]
        assert total > len(pruned.consumers) if behind else total == len(pruned.consumers)


def narrowed(model, reader, share):
    """The model whose group that `reader` reads has lost its last units."""
    coupling = find_groups(model)
    group = next(group for group in coupling.groups if group.consumers == (reader,))
    plan = [GroupWidth(group=group.name, kept=tuple(range(int(group.units * share))))]
    return apply_pruning(model, coupling, plan)


def test_layers_behind_win_back_what_a_narrow_one_loses():
    model, calibration, fresh = residual_net(), samples_of(160), samples_of(60, seed=9)
    pruned = narrowed(model, "a2", 0.25)
    alone, joined = (
        refit_sequential(model, pruned, calibration, settings=RefitSettings(behind=behind))
        for behind in (False, True)
    )
    assert error_of(joined, model, fresh) < 0.9 * error_of(alone, model, fresh)


def test_layers_before_the_cut_and_ignored_ones_keep_their_weights():
    model = residual_net()
    pruned = narrowed(model, "b2", 0.5)
    result = refit_sequential(model, pruned, samples_of(96), settings=RefitSettings(ignored=frozenset({"head"})))
    before, after = index_contractions(pruned.model), index_contractions(result)
    touched = {name for name in before if not np.array_equal(weight_matrix(before[name]), weight_matrix(after[name]))}
    assert "b2" in touched
    assert touched <= {"b1", "b2", "down"}


@pytest.mark.parametrize("count", [1, 2, 6])
def test_too_few_samples_do_no_harm_to_the_held_back_error(count):
    # with fewer samples than columns the fit is decided by the ridge; nothing is held back below five
    model, samples = residual_net(), samples_of(count)
    pruned, _ = pruned_net(model)
    refit = refit_sequential(model, pruned, samples, settings=RefitSettings(rows_per_sample=4))
    fresh = samples_of(40, seed=5)
    assert error_of(refit, model, fresh) <= 1.02 * error_of(pruned.model, model, fresh)


def test_a_perfect_model_stays_as_it_is():
    model, samples = linear_net(np.random.default_rng(4)), samples_of(30)
    pruned = apply_pruning(model, find_groups(model), [GroupWidth(group="first", kept=tuple(range(4, 10)))])
    exact = dataclasses.replace(
        pruned, model=refit_sequential(model, pruned, samples, settings=RefitSettings(ridge=0))
    )
    again = refit_sequential(model, exact, samples)
    np.testing.assert_allclose(run(again, samples), run(model, samples), atol=1e-3)


# --------------------------------------------------------------------------- bias correction


def test_biases_are_brought_back_layer_by_layer():
    model, samples, fresh = residual_net(), samples_of(40), samples_of(40, seed=8)
    broken = model.clone()
    rng = np.random.default_rng(3)
    names = list(index_contractions(broken))
    for layer in index_contractions(broken).values():
        replace_bias(layer, bias_vector(layer) + 0.3 * rng.standard_normal(layer.outputs))
    mended = correct_bias(model, broken, samples, names)
    assert error_of(broken, model, fresh) > 0.05
    assert error_of(mended, model, fresh) < 1e-4
    np.testing.assert_array_equal(run(broken, samples), run(broken.clone(), samples))


def test_bias_correction_of_a_pruned_model_looks_at_the_kept_channels():
    model, samples = residual_net(), samples_of(60)
    pruned, _ = pruned_net(model)
    rows = {cut.name: cut.kept_rows for cut in pruned.producers}
    mended = correct_bias(
        model, pruned.model, samples, ["stem", "a1", "a2", "b1", "b2", "head"], kept_rows=rows
    )
    fresh = samples_of(40, seed=8)
    assert error_of(mended, model, fresh) < 0.9 * error_of(pruned.model, model, fresh)


def test_bias_correction_works_behind_fake_quantize():
    model, samples, fresh = residual_net(), samples_of(40), samples_of(40, seed=8)
    coarse = model.clone()
    for layer in index_contractions(coarse).values():
        source = layer.node.input_value(1)
        top = float(np.abs(source.get_node().get_data()).max())
        low, high = opset.constant(np.float32(-top)), opset.constant(np.float32(top))
        layer.node.input(1).replace_source_output(
            opset.fake_quantize(source, low, high, low, high, 7).output(0)
        )
    mended = correct_bias(model, coarse, samples, list(index_contractions(coarse)))
    assert error_of(mended, model, fresh) < 0.9 * error_of(coarse, model, fresh)


def test_an_unknown_layer_is_refused():
    with pytest.raises(PlanError, match='did you mean "head"'):
        correct_bias(residual_net(), residual_net(), samples_of(4), ["haed"])


# --------------------------------------------------------------------------- activations


def test_a_stream_gives_what_the_whole_model_gives_wherever_it_stands():
    model, samples = residual_net(), samples_of(7)
    names = ["a1", "a2", "b1", "b2", "down", "head"]
    whole = Part([index_contractions(model)[name].node.output(0) for name in names], model.get_parameters())
    expected = [whole.run([sample["x"]]) for sample in samples]
    graph = model.clone()
    layers = index_contractions(graph)
    stream = ActivationStream(graph, list(iterate_calls(model, samples, size=1)), memory_bytes=1 << 20)
    for place, name in enumerate(names):
        stream.advance(layers[name].node)
        for (value,), wanted in zip(stream.read([layers[name].node.output(0)]), expected, strict=True):
            np.testing.assert_allclose(value, wanted[place], atol=1e-5)


def test_samples_are_joined_only_where_the_batch_is_open():
    free, fixed = residual_net(), residual_net(batch=1)
    assert [len(call["x"]) for call in iterate_calls(free, samples_of(7), size=3)] == [3, 3, 1]
    assert [len(call["x"]) for call in iterate_calls(free, samples_of(8, size=2), size=4)] == [4, 4]
    assert [len(call["x"]) for call in iterate_calls(fixed, samples_of(3), size=3)] == [1, 1, 1]


def test_a_stretch_that_does_not_fit_its_input_is_reported():
    model = residual_net()
    part = Part([index_contractions(model)["a1"].node.output(0)], model.get_parameters())
    with pytest.raises(CompressionError, match="stretch of the model"):
        part.run([np.zeros((1, 4, 10, 10), np.float32)])


# --------------------------------------------------------------------------- a real network


def cifar(shared, part, count):
    data = np.load(shared / "data" / "cifar10_dev.npz")
    images = data[f"{part}_images"][:count].astype(np.float32) / 255
    images = (images - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32))
    return [{"x": image[None]} for image in images]


def test_resnet20_is_mostly_restored(shared):
    model = ov.Core().read_model(shared / "models" / "cifar_resnet20.onnx")
    calibration = cifar(shared, "calib", 128)
    fresh = [{"x": np.concatenate([sample["x"] for sample in cifar(shared, "test", 400)])}]
    pruned, statistics = pruned_net(model, keep=0.75, calibration=calibration)
    local = refit_local(model, pruned, statistics)
    sequential = refit_sequential(
        model,
        dataclasses.replace(pruned, model=local),
        calibration,
        settings=RefitSettings(rows_per_sample=32),
    )
    wanted = run(model, fresh).argmax(axis=1)
    agreement = [
        (run(each, fresh).argmax(axis=1) == wanted).mean() for each in (pruned.model, local, sequential)
    ]
    assert agreement[1] > agreement[0] + 0.2
    assert agreement[2] > agreement[1]


@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_a_wide_layer_gets_the_ridge_of_the_valley(noise: float) -> None:
    rng = np.random.default_rng(0)
    columns = EXACT_COLUMNS + 8
    weights = rng.standard_normal((columns, 2)) / np.sqrt(columns)
    sums = []
    for rows in (1400, 300):
        x = rng.standard_normal((1, rows, columns)).astype(np.float32)
        error = x @ weights.astype(np.float32) + noise * rng.standard_normal((1, rows, 2)).astype(np.float32)
        sums.append(PairedSums.empty(1, columns, 2))
        sums[-1].add(x, error)
    fitted, held = sums
    tried = {ridge: held.error(*fitted.solve(ridge)) for ridge in (np.inf, *RIDGES)}
    best = min(tried, key=lambda ridge: tried[ridge])
    found = best_fit(fitted, held, None)
    if found is None:
        assert tried[best] >= held.ee / held.rows
    else:
        assert held.error(*found) == pytest.approx(tried[best], rel=1e-6)


class CountedSums(PairedSums):
    """Sums whose errors per ridge are given, and which count how often they are solved."""

    __slots__ = ("errors", "tried")

    def solve(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        self.tried.append(ridge)
        return np.full(1, self.errors[ridge]), np.zeros(1)

    def error(self, change: np.ndarray, shift: np.ndarray) -> float:
        return float(change[0])


@pytest.mark.parametrize("place", range(1 + len(RIDGES)))
def test_wherever_the_valley_lies_it_is_found_with_fewer_solutions(place: int) -> None:
    ridges = (np.inf, *RIDGES)
    sums = CountedSums.empty(1, EXACT_COLUMNS + 1, 1)
    sums.rows, sums.ee = 1, 100.0
    sums.errors = {ridge: float(abs(number - place)) for number, ridge in enumerate(ridges)}
    sums.tried = []
    found = best_fit(sums, sums, None)
    assert found is not None
    assert found[0][0] == 0.0
    assert len(sums.tried) == len(set(sums.tried)) < len(ridges)
