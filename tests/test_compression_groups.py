"""Pruning groups: which channels live or die together, and why some must stay."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
from graphs import GRAPHS, Net, bert, chain, inverted_residual, model, residual
from openvino._offline_transformations import apply_moc_transformations

from vinoopt.compression.groups import Coupling, find_groups
from vinoopt.errors import PlanError

EXPECTED = {
    "chain": {"c1": 8, "c2": 12},
    "flatten_head": {"c1": 8, "f1": 10},
    "residual": {"stem": 8, "a0": 6, "a1": 6, "down": 16, "down2": 16},
    "option_a": {"stem": 8, "a": 16, "b": 8},
    "depthwise": {"stem": 8, "pw": 12},
    "inverted_residual": {"stem": 6, "expand0": 18, "squeeze0": 5, "expand1": 18, "squeeze1": 5},
    "dense_net": {"stem": 8, "neck0": 12, "grow0": 4, "neck1": 12, "grow1": 4, "neck2": 12, "grow2": 4,
                  "transition": 10},
    "fire": {"stem": 8, "squeeze0": 4, "e10": 6, "e30": 7, "squeeze1": 4, "e11": 6, "e31": 7},
    "grouped": {"stem": 16, "reduce": 6},
    "inception": {"stem": 8, "a": 4, "b1": 6, "b2": 8, "c": 5, "join": 10},
    "unet": {"enc1": 8, "enc2": 12, "up": 8, "dec": 10},
    "two_inputs_two_outputs": {"image": 8, "both": 12},
    "shared_weight": {"a": 8, "tower0": 8},
    "shared_vectors": {"a": 8, "b": 8, "c": 8},
    "vit": {"qkv0": 4, "fc10": 48, "qkv1": 4, "fc11": 48},
    "bert": {"q0": 4, "fc10": 48, "q1": 4, "fc11": 48, "pooler": 24},
    "sdpa": {"q": 4},
    "grouped_queries": {"q": 2},
    "einsum_attention": {"q": 4},
    "split_attention": {"stem": 6, "radix": 10, "fc1": 6, "last": 7},
    "lstm": {"in1": 12, "out1": 12},
    "half_constants": {"c0": 8, "c1": 12},
    "fake_quantized": {"c0": 8, "c1": 12},
    "glu": {"in": 16},
    "whole_branch_norm": {"b": 10},
}  # fmt: skip


def widths(coupling: Coupling) -> dict[str, int]:
    return {group.name: group.units for group in coupling.groups}


def reason(coupling: Coupling, name: str) -> str:
    return next(group.reason for group in coupling.blocked if group.name == name)


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_known_graphs(name: str) -> None:
    assert widths(find_groups(GRAPHS[name]())) == EXPECTED[name]


def test_option_a_shortcut_couples_stages(shared: Path) -> None:
    """Three stages coupled over the residual additions, nine inner widths, and no operator without a rule."""
    net = ov.Core().read_model(shared / "models" / "cifar_resnet20.onnx")
    apply_moc_transformations(net, cf=True)
    coupling = find_groups(net)
    assert len(coupling.groups) == 12
    assert not coupling.frozen
    assert sorted(widths(coupling).values()) == [16] * 5 + [32] * 4 + [64] * 3
    stages = [group for group in coupling.groups if len(group.producers) > 1]
    assert [group.units for group in stages] == [16, 16, 32]


@pytest.mark.parametrize(
    ("graph", "group", "kind"),
    [
        ("vit", "qkv0", "heads"),
        ("bert", "q0", "heads"),
        ("grouped", "reduce", "groups"),
        ("chain", "c1", "channels"),
    ],
)
def test_kinds(graph: str, group: str, kind: str) -> None:
    assert find_groups(GRAPHS[graph]()).group(group).kind == kind


@pytest.mark.parametrize(
    ("graph", "vanishing"),
    [
        ("chain", set()),
        ("residual", {"a0", "a1", "down"}),
        ("inverted_residual", {"expand0", "expand1"}),
        ("bert", {"q0", "fc10", "q1", "fc11"}),
        ("glu", {"in"}),
    ],
)
def test_branches_beside_a_residual_path_may_vanish(graph: str, vanishing: set[str]) -> None:
    assert {group.name for group in find_groups(GRAPHS[graph]()).groups if group.can_vanish} == vanishing


@pytest.mark.parametrize(
    ("graph", "group", "why"),
    [
        ("chain", "head", "model output"),
        ("lstm", "in2", "LSTMSequence"),
        ("whole_branch_norm", "a", "GroupNormalization .* no rule"),
        ("indexed", "b", "ReduceMean"),
        ("bert", "proj0", "MVN .* runs over it"),
    ],
)
def test_what_cannot_be_pruned_says_why(graph: str, group: str, why: str) -> None:
    assert re.search(why, reason(find_groups(GRAPHS[graph]()), group))


def test_operators_without_a_rule_are_listed() -> None:
    coupling = find_groups(GRAPHS["lstm"]())
    assert [(layer.op_type, layer.reason) for layer in coupling.frozen] == [
        ("LSTMSequence", "no rule for this operator")
    ]


def test_units_say_where_they_lie() -> None:
    coupling = find_groups(GRAPHS["flatten_head"]())
    (rows,) = coupling.rows["c1"]
    assert rows.name == "c1"
    np.testing.assert_array_equal(rows.unit_of, np.arange(8))
    (columns,) = coupling.columns["c1"]
    assert columns.name == "f1"
    np.testing.assert_array_equal(columns.unit_of, np.repeat(np.arange(8), 36))


def test_a_head_is_one_unit_of_many_rows() -> None:
    coupling = find_groups(bert())
    producers = {units.name: units.unit_of for units in coupling.rows["q0"]}
    assert set(producers) == {"q0", "k0", "v0"}
    for unit_of in producers.values():
        np.testing.assert_array_equal(unit_of, np.repeat(np.arange(4), 6))
    (consumer,) = coupling.columns["q0"]
    assert consumer.name == "proj0"


def test_ignored_layers_keep_their_sides() -> None:
    found = widths(find_groups(inverted_residual(), ignored=["dw0"]))
    assert set(found) == {"stem", "squeeze0", "expand1", "squeeze1"}
    blocked = reason(find_groups(chain(), ignored=["c2"]), "c1")
    assert blocked == "'c2' is to be left alone"
    with pytest.raises(PlanError, match='"c3" is not in the model; did you mean "c'):
        find_groups(chain(), ignored=["c3"])


def test_same_graph_gives_the_same_groups() -> None:
    net = residual()
    one, other, copied = find_groups(net), find_groups(net), find_groups(net.clone())
    assert one.groups == other.groups == copied.groups == find_groups(residual()).groups
    assert one.blocked == other.blocked == copied.blocked


def test_default_scale_of_attention_needs_no_query_features() -> None:
    """Heads may go; features of queries may not, scale or no scale."""
    coupling = find_groups(GRAPHS["sdpa"]())
    assert coupling.group("q").kind == "heads"


def test_softmax_over_channels_keeps_them() -> None:
    net = Net()
    x = net.input(1, 3, 6, 6)
    y = op.softmax(net.conv(x, 8, name="a"), 1)
    coupling = find_groups(model([net.head(y)], [x]))
    assert not coupling.groups
    assert "Softmax" in reason(coupling, "a")


def test_a_weight_read_by_an_unknown_operator_keeps_its_size() -> None:
    net = Net()
    x = net.input(1, 3, 6, 6)
    weight = net.const(8, 3, 1, 1)
    y = op.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    y.set_friendly_name("a")
    best = op.topk(weight, op.constant(np.int64(1)), 0, "max", "value").output(0)
    coupling = find_groups(model([net.head(op.relu(y)), op.relu(best)], [x], moc=False))
    assert not coupling.groups
    assert "TopK" in reason(coupling, "a")


@pytest.mark.slow
def test_large_encoder_takes_seconds() -> None:
    net = bert(depth=12, width=768, heads=12, vocabulary=30522)
    start = time.perf_counter()
    coupling = find_groups(net)
    assert time.perf_counter() - start < 10  # about 1 s; the rest is for a busy machine
    assert sum(group.kind == "heads" for group in coupling.groups) == 12
