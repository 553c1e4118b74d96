"""Layers that stand for residual branches: which branches, how near they come, and what is left to prune."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

from vinoopt.accuracy.datasets import from_arrays
from vinoopt.compression.contractions import index_contractions
from vinoopt.compression.folding import find_branches
from vinoopt.compression.groups import find_groups
from vinoopt.compression.widths import PruningKit, offered_widths, prepare, size_of
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import GroupWidth, TensorSpec
from vinoopt.store import Store

INPUT = TensorSpec(name="x", shape=("?", 3, 12, 12), dtype="float32")


def images(count: int = 64) -> np.ndarray:
    rng = np.random.default_rng(3)
    smooth = np.kron(rng.standard_normal((count, 3, 4, 4)), np.ones((1, 1, 3, 3)))
    return (smooth + 0.3 * rng.standard_normal(smooth.shape)).astype(np.float32)


def conv(rng, x, inputs, outputs, name, *, kernel=3, stride=1, bias=True):
    scale = (1 / (inputs * kernel**2)) ** 0.5
    weights = opset.constant((scale * rng.standard_normal((outputs, inputs, kernel, kernel))).astype(np.float32))
    pad = [kernel // 2] * 2
    node = opset.convolution(x, weights, [stride] * 2, pad, pad, [1, 1])
    node.set_friendly_name(name)
    vector = opset.constant(rng.standard_normal((1, outputs, 1, 1)).astype(np.float32))
    return opset.add(node, vector) if bias else node


def net(*, active=True, stride=1, leaks=False, breaks=False) -> ov.Model:
    """A stem, a residual branch of two layers (`first`, `last`), a reader behind it and a pooled head."""
    rng = np.random.default_rng(0)
    x = opset.parameter([-1, 3, 12, 12], np.float32)
    x.set_friendly_name("x")
    x.output(0).set_names({"x"})
    stem = (opset.sqrt if breaks else opset.relu)(conv(rng, x, 3, 16, "stem"))  # a square root of what is negative
    inner = conv(rng, stem, 16, 24, "first", kernel=1, stride=stride, bias=active)
    made = conv(rng, opset.relu(inner) if active else inner, 24, 16, "last", bias=active)
    trunk = stem if stride == 1 else conv(rng, stem, 16, 16, "down", kernel=1, stride=stride)
    block = opset.relu(opset.add(made, trunk))
    behind = opset.relu(conv(rng, block, 16, 16, "behind"))
    outputs = [opset.reduce_mean(behind, opset.constant(np.array([2, 3])), False)]
    if leaks:
        outputs.append(opset.reduce_mean(inner, opset.constant(np.array([2, 3])), False))
    return ov.Model([opset.result(each) for each in outputs], [x], "net")


def kit_of(model: ov.Model, count: int = 64) -> PruningKit:
    kit = prepare(model, from_arrays(images(count), inputs=[INPUT]), ignored=(), seed=0, say=lambda text: None)
    assert kit is not None
    return kit


def error(model: ov.Model, other: ov.Model) -> float:
    """Mean squared difference over the variance of the first model's outputs, on fresh inputs."""
    data = np.random.default_rng(9).permutation(images(96)[64:])
    one, two = (
        ov.Core().compile_model(each, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(data)[0] for each in (model, other)
    )
    return float(np.square(one - two).mean() / one.var())


def test_a_branch_without_activation_is_stood_for_exactly():
    model = net(active=False)
    kit = kit_of(model)
    small = kit.roughly(kit.widths({"first": -3}))
    assert [name for name in index_contractions(small) if name in ("first", "last")] == ["last"]
    assert error(model, small) < 1e-3 < error(model, kit.roughly(kit.widths({"first": 0})))


def test_a_stand_in_comes_nearer_than_the_mean_and_the_layers_behind_nearer_still():
    model = net()
    kit = kit_of(model)
    damages = {width: error(model, kit.roughly(kit.widths({"first": width}))) for width in (-3, -1, 0)}
    assert damages[-3] < damages[-1] < damages[0]
    refitted = error(model, kit.thoroughly(kit.widths({"first": -3})))
    assert refitted < damages[-3]


def test_what_is_left_is_pruned_and_refitted_with_the_stand_in():
    model = net()
    kit = kit_of(model)
    trunk = kit.coupling.groups[0].name
    widths = kit.widths({"first": -3, trunk: 8})
    assert GroupWidth(group="first", kept=(), stand_in=3) in widths
    small = kit.thoroughly(widths)
    layers = index_contractions(small)
    assert (layers["last"].columns, layers["last"].outputs) == (8 * 9, 8)
    assert kit.proven(widths) < 1e-5
    untouched = kit.roughly(kit.widths({"first": 0, trunk: 8}))
    assert error(model, small) < error(model, untouched)


def test_a_strided_branch_has_a_strided_stand_in():
    model = net(stride=2)
    (branch,) = find_branches(model, find_groups(model))
    assert (branch.end, branch.strides, branch.kernels) == ("last", (2, 2), (3, 1))
    small = kit_of(model).roughly((GroupWidth(group="first", kept=(), stand_in=3),))
    assert small.output(0).get_partial_shape() == model.output(0).get_partial_shape()


def test_a_feed_forward_branch_has_a_matrix_product_that_reads_behind_the_normalisation():
    model = graphs.bert()
    branches = find_branches(model, find_groups(model))
    assert branches
    assert {branch.kernels for branch in branches} == {(1,)}
    assert all(branch.strides == () for branch in branches)


@pytest.mark.parametrize("model", [net(leaks=True), graphs.dense_net(), graphs.chain(), graphs.unet()])
def test_other_graphs_have_no_branch_to_stand_for(model: ov.Model):
    assert find_branches(model, find_groups(model)) == ()


def test_every_kind_of_graph_stays_valid_with_all_its_stand_ins():
    for make in (graphs.residual, graphs.option_a, graphs.inverted_residual, graphs.vit, graphs.bert, graphs.sdpa):
        model = make()
        coupling = find_groups(model)
        names = [str(number) for number in range(len(model.inputs))]
        samples = [graphs.random_sample(model, np.random.default_rng(seed), batch=1) for seed in range(12)]
        specs = [TensorSpec(name=n, shape=samples[0][n].shape, dtype=samples[0][n].dtype.name) for n in names]
        data = from_arrays({n: np.concatenate([s[n] for s in samples]) for n in names}, inputs=specs)
        kit = prepare(model, data, ignored=(), seed=0, say=lambda text: None)
        assert kit is not None
        kept = {branch.group: -branch.kernels[0] for branch in find_branches(model, coupling)}
        small = kit.thoroughly(kit.widths(kept))
        assert len(index_contractions(small)) <= len(index_contractions(model)) - len(kept)
        result = ov.Core().compile_model(small, "CPU")(list(samples[0].values()))
        assert all(np.isfinite(value).all() for value in result.values())


def test_what_no_branch_offers_is_refused():
    kit = kit_of(net())
    with pytest.raises(PlanError, match="no layer of kernel 5"):
        kit.cut((GroupWidth(group="first", kept=(), stand_in=5),))
    with pytest.raises(PlanError, match="no layer can stand for"):
        kit.cut((GroupWidth(group="stem", kept=(), stand_in=3),))


def test_activations_that_are_not_finite_are_told():
    with pytest.raises(CompressionError, match="not finite"):
        kit_of(net(breaks=True))


def test_a_later_run_learns_nothing_again_and_cuts_the_same(tmp_path: Path):
    store, model, data = Store.open("kit", root=tmp_path), net(), from_arrays(images(64), inputs=[INPUT])
    told: list[list[str]] = []
    kits = []
    for _ in range(2):
        told.append([])
        kits.append(prepare(model, data, ignored=(), seed=0, say=told[-1].append, store=store))
    assert len(told[0]) == 3
    assert told[1] == []
    first, second = kits
    assert first is not None
    assert second is not None
    kept = {"first": -3, first.coupling.groups[0].name: 8}
    assert first.widths(kept) == second.widths(kept)
    assert error(first.thoroughly(first.widths(kept)), second.thoroughly(second.widths(kept))) == 0
    assert prepare(model, data, ignored=("behind",), seed=0, say=told[-1].append, store=store) is not None
    assert len(told[1]) == 3, "other layers may be cut, so other things are to be learnt"


def test_stand_ins_lie_between_units_and_nothing():
    group = next(group for group in find_groups(net()).groups if group.name == "first")
    offers = offered_widths(group, multiple=8, max_pruning=0.5, kernels=(3, 1))
    assert offers == (20, 16, 12, -3, -1, 0)
    assert sorted(offers, key=size_of, reverse=True) == list(offers)
    assert offered_widths(group, multiple=8, max_pruning=0.0, kernels=(3, 1)) == ()
