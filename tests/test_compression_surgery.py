"""Surgery: the smaller model computes what the whole one does with the dropped columns at zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from graphs import (
    GRAPHS,
    PIECES,
    TOLERANCE,
    chain,
    inverted_residual,
    proven_difference,
    random_graph,
    random_sample,
    random_widths,
    residual,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openvino._offline_transformations import apply_moc_transformations

from vinoopt.compression.groups import Coupling, find_groups
from vinoopt.compression.surgery import apply_pruning, verify_pruning, zeroed_reference
from vinoopt.errors import CompressionError, PlanError
from vinoopt.records import GroupWidth

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def read(path: Path) -> ov.Model:
    net = ov.Core().read_model(path)
    apply_moc_transformations(net, cf=True)
    return net


def every_group(coupling: Coupling, share: float = 0.5) -> list[GroupWidth]:
    return [
        GroupWidth(group=group.name, kept=tuple(range(max(1, int(group.units * share)))))
        for group in coupling.groups
    ]


def size(net: ov.Model) -> int:
    return sum(op.get_byte_size() for op in net.get_ops() if op.get_type_name() == "Constant")


def weights(net: ov.Model, name: str) -> np.ndarray:
    node = next(op for op in net.get_ops() if op.get_friendly_name() == name)
    return np.asarray(node.input_value(1).get_node().get_data())


def outputs(net: ov.Model, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    compiled = ov.Core().compile_model(net, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled({int(key): value for key, value in sample.items()}).values())


@pytest.mark.parametrize("name", GRAPHS)
def test_smaller_model_equals_the_zeroed_one(name: str) -> None:
    net = GRAPHS[name]()
    coupling = find_groups(net)
    assert coupling.groups
    rng = np.random.default_rng(3)
    for _ in range(3):
        assert proven_difference(net, coupling, random_widths(coupling.groups, rng), rng) < TOLERANCE


@pytest.mark.parametrize("name", GRAPHS)
def test_plan_is_felt(name: str) -> None:
    """Otherwise the proof above would compare a model with itself."""
    net = GRAPHS[name]()
    coupling = find_groups(net)
    widths = every_group(coupling)
    pruned = apply_pruning(net, coupling, widths)
    assert size(pruned.model) < size(net)
    sample = random_sample(net, np.random.default_rng(0))
    reference = outputs(zeroed_reference(net, coupling, widths), sample)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(outputs(net, sample), reference, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_each_group_that_may_vanish_can_go(name: str) -> None:
    net = GRAPHS[name]()
    coupling = find_groups(net)
    rng = np.random.default_rng(5)
    for group in coupling.groups:
        if group.can_vanish:
            assert proven_difference(net, coupling, [GroupWidth(group=group.name, kept=())], rng) < TOLERANCE


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    flat=st.booleans(),
    batch=st.sampled_from([-1, 1, 2]),
)
def test_random_graphs_and_plans(pieces: list[str], seed: int, flat: bool, batch: int) -> None:
    net = random_graph(pieces, seed, flat=flat, batch=batch)
    coupling = find_groups(net)
    assert not coupling.frozen
    rng = np.random.default_rng(seed)
    assert proven_difference(net, coupling, random_widths(coupling.groups, rng), rng) < TOLERANCE
    widths = random_widths(coupling.groups, rng, vanish=0.3)
    try:
        assert proven_difference(net, coupling, widths, rng) < TOLERANCE
    except PlanError as exc:
        # Two groups that may each go need not be allowed to go together.
        assert "drops too much" in str(exc)
        assert sum(not width.kept for width in widths) > 1


def test_input_model_stays_as_it_was() -> None:
    net = residual()
    sample = random_sample(net, np.random.default_rng(0))
    before, was = outputs(net, sample), size(net)
    coupling = find_groups(net)
    apply_pruning(net, coupling, every_group(coupling))
    zeroed_reference(net, coupling, every_group(coupling))
    assert size(net) == was
    for one, other in zip(before, outputs(net, sample), strict=True):
        np.testing.assert_array_equal(one, other)


def test_names_and_ports_survive() -> None:
    net = inverted_residual()
    coupling = find_groups(net)
    pruned = apply_pruning(net, coupling, every_group(coupling)).model
    wanted = {op.get_friendly_name() for op in net.get_ops() if op.get_type_name() != "Constant"}
    assert wanted <= {op.get_friendly_name() for op in pruned.get_ops()}
    assert pruned.input(0).get_names() == net.input(0).get_names()
    assert pruned.output(0).get_partial_shape() == net.output(0).get_partial_shape()


def test_cuts_map_old_weights_to_new_ones() -> None:
    net = inverted_residual()
    coupling = find_groups(net)
    rng = np.random.default_rng(1)
    pruned = apply_pruning(net, coupling, random_widths(coupling.groups, rng))
    assert pruned.consumers and pruned.producers
    grouped = {layer.name for layer in coupling.layers if not layer.is_reader}
    for cut in (*pruned.consumers, *pruned.producers):
        if cut.name not in grouped:
            whole = weights(net, cut.name)
            assert whole.shape[:2] == (cut.rows, cut.columns)
            np.testing.assert_array_equal(
                weights(pruned.model, cut.name), whole[np.ix_(cut.kept_rows, cut.kept_columns)]
            )
    assert {cut.name for cut in pruned.consumers} <= {
        name for group in coupling.groups for name in group.consumers
    }


def test_a_model_without_cuts_is_a_copy() -> None:
    net = chain()
    coupling = find_groups(net)
    pruned = apply_pruning(net, coupling, [])
    assert (pruned.consumers, pruned.producers, pruned.constants) == ((), (), ())
    sample = random_sample(net, np.random.default_rng(0))
    np.testing.assert_array_equal(outputs(pruned.model, sample)[0], outputs(net, sample)[0])


@pytest.mark.parametrize("name", ["chain", "flatten_head", "channel_shuffle", "vit"])
def test_pruned_model_serves_other_batches(name: str) -> None:
    """A plan is fitted with a batch and deployed with the model's own."""
    net = GRAPHS[name]()
    coupling = find_groups(net)
    widths = every_group(coupling)
    pruned, reference = apply_pruning(net, coupling, widths).model, zeroed_reference(net, coupling, widths)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        assert verify_pruning(pruned, reference, [random_sample(net, rng, batch=batch)]) < TOLERANCE
        fixed = pruned.clone()
        fixed.reshape([batch, *list(net.input(0).get_partial_shape())[1:]])
        assert verify_pruning(fixed, reference, [random_sample(net, rng, batch=batch)]) < TOLERANCE


def test_static_batch() -> None:
    net = chain(batch=4)
    coupling = find_groups(net)
    rng = np.random.default_rng(0)
    assert proven_difference(net, coupling, random_widths(coupling.groups, rng), rng) < TOLERANCE


def test_mean_stands_for_a_vanished_branch() -> None:
    net = residual()
    coupling = find_groups(net)
    gone = GroupWidth(group="a0", kept=())
    sample = random_sample(net, np.random.default_rng(0))
    mean = np.linspace(-1, 1, 8)
    pruned = apply_pruning(net, coupling, [gone], means={"b0": mean})
    assert pruned.constants == ("b0",)
    assert {"a0", "b0"}.isdisjoint(op.get_friendly_name() for op in pruned.model.get_ops())

    # The same function by hand: the branch's last weights at zero, its mean added to the bias.
    other = zeroed_reference(net, coupling, [gone])
    node = next(op for op in other.get_ops() if op.get_friendly_name() == "b0")
    shifted = ov.opset13.add(node, ov.opset13.constant(mean.reshape(1, 8, 1, 1).astype(np.float32)))
    for target in node.output(0).get_target_inputs():
        if target.get_node().get_name() != shifted.get_name():
            target.replace_source_output(shifted.output(0))
    assert verify_pruning(pruned.model, other, [sample]) < TOLERANCE
    with pytest.raises(PlanError, match="mean of 'b0'"):
        apply_pruning(net, coupling, [gone], means={"b0": np.zeros(3)})


def test_mean_follows_the_rows_that_stay() -> None:
    net = residual()
    coupling = find_groups(net)
    widths = [GroupWidth(group="a0", kept=()), GroupWidth(group="stem", kept=(1, 4, 7))]
    pruned = apply_pruning(net, coupling, widths, means={"b0": np.arange(8)})
    made = next(op for op in pruned.model.get_ops() if op.get_friendly_name() == "b0/mean")
    np.testing.assert_array_equal(made.get_data().ravel(), [1, 4, 7])


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([GroupWidth(group="c9", kept=(0,))], 'no group "c9"; did you mean "c'),
        ([GroupWidth(group="c1", kept=(0, 8))], "units 0 to 7"),
        ([GroupWidth(group="c1", kept=(-1,))], "units 0 to 7"),
        ([GroupWidth(group="c1", kept=(1, 1))], "kept twice"),
        ([GroupWidth(group="c1", kept=())], "must keep a unit"),
        ([GroupWidth(group="c1", kept=(0,)), GroupWidth(group="c1", kept=(0,))], "named twice"),
        ([GroupWidth(group="head", kept=(0,))], "cannot be pruned: model output"),
    ],
)
def test_plan_that_does_not_fit(widths: list[GroupWidth], message: str) -> None:
    net = chain()
    coupling = find_groups(net)
    for use in (apply_pruning, zeroed_reference):
        with pytest.raises(PlanError, match=message):
            use(net, coupling, widths)


def test_groups_of_another_model_are_refused() -> None:
    with pytest.raises(PlanError, match="another model"):
        apply_pruning(residual(), find_groups(chain()), [])


def test_branches_that_may_not_go_together() -> None:
    """Both sides of a concatenation may go alone; without both nothing is left to read."""
    net = GRAPHS["fire"]()
    coupling = find_groups(net)
    gone = [GroupWidth(group=name, kept=()) for name in ("e11", "e31")]
    for each in gone:
        apply_pruning(net, coupling, [each])
    with pytest.raises(PlanError, match="drops too much"):
        apply_pruning(net, coupling, gone)


def test_verification_sees_a_wrong_channel() -> None:
    net = chain()
    coupling = find_groups(net)
    pruned = apply_pruning(net, coupling, [GroupWidth(group="c1", kept=(0, 1, 2, 3))])
    other = zeroed_reference(net, coupling, [GroupWidth(group="c1", kept=(0, 1, 2, 4))])
    sample = random_sample(net, np.random.default_rng(0))
    assert verify_pruning(pruned.model, other, [sample]) > 100 * TOLERANCE


def test_verification_refuses_other_shapes() -> None:
    net = chain()
    other = net.clone()
    result = other.get_results()[0]
    wide = ov.opset13.concat([result.input_value(0), result.input_value(0)], 1)
    result.input(0).replace_source_output(wide.output(0))
    other.validate_nodes_and_infer_types()
    with pytest.raises(CompressionError, match="shape"):
        verify_pruning(net, other, [{"0": np.zeros((1, 3, 12, 12), np.float32)}])


# --------------------------------------------------------------------------- real networks

SHARED = [
    "cifar_resnet20",
    "cifar10_resnet32_akamaster_op11",
    "external_data_resnet/model",
    "magika_standard_v2_1",
    "mnist_cntk",
    "mobilenetv2_1.0_224_qat_qdq_u8",
    "mobilenetv2_1.0_224_qatdeq",
    "ppocr_cls",
    "silero_vad_openvino_16k",
    "squeezenet1.0_fp16",
    "squeezenet1.0_fp32",
    "tiny_vww96_mlperf",
    "ultraface_rfb_320",
    "yolox_nano",
]
QUICK = {
    "cifar_resnet20",
    "mnist_cntk",
    "magika_standard_v2_1",
    "silero_vad_openvino_16k",
    "ultraface_rfb_320",
}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SHARED]
)
def test_shared_models(shared: Path, name: str) -> None:
    net = read(shared / "models" / f"{name}.onnx")
    coupling = find_groups(net)
    assert coupling.groups
    rng = np.random.default_rng(0)
    for vanish in (0.0, 0.3):
        widths = random_widths(coupling.groups, rng, vanish=vanish, most=1)
        length = 64
        pruned, reference = (
            apply_pruning(net, coupling, widths).model,
            zeroed_reference(net, coupling, widths),
        )
        assert verify_pruning(pruned, reference, [random_sample(net, rng, length=length)]) < TOLERANCE


def test_real_images(shared: Path) -> None:
    with np.load(shared / "data" / "cifar10_dev.npz") as data:
        images = next(data[key][:32] for key in data.files if data[key].ndim == 4)
    if images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    net = read(shared / "models" / "cifar_resnet20.onnx")
    coupling = find_groups(net)
    widths = random_widths(coupling.groups, np.random.default_rng(2), vanish=0.3, most=1)
    pruned, reference = apply_pruning(net, coupling, widths).model, zeroed_reference(net, coupling, widths)
    assert verify_pruning(pruned, reference, [{"0": images.astype(np.float32) / 255}]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_light_graphs_of_onnx(path: Path) -> None:
    net = read(path)
    coupling = find_groups(net)
    assert coupling.groups and not coupling.frozen
    rng = np.random.default_rng(0)
    # Their weights are all alike, so a wrong channel would go unseen: make them random.
    for node in net.get_ops():
        if (
            node.get_type_name() == "Constant"
            and node.get_element_type() == ov.Type.f32
            and node.get_byte_size() > 64
        ):
            shape = list(node.get_output_shape(0))
            fan = max(int(np.prod(shape)) // max(shape[0], 1), 1)
            drawn = ov.opset13.constant((rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32))
            drawn.set_friendly_name(node.get_friendly_name())
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(drawn.output(0))
    widths = random_widths(coupling.groups, rng, vanish=0.1, most=1)
    assert proven_difference(net, coupling, widths, rng) < TOLERANCE
