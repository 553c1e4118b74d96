"""Training through the public door: better or unchanged, the same every time, and taken up where it was cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'vinoopt[distill]'")

import vinoopt  # noqa: E402
from vinoopt.accuracy.datasets import Dataset, from_arrays  # noqa: E402
from vinoopt.compression.quantize import quantize  # noqa: E402
from vinoopt.distillation.augment import find_augment, image_axes  # noqa: E402
from vinoopt.distillation.distiller import Distilled, Run, last_rate, train  # noqa: E402
from vinoopt.distillation.layouts import find_detector  # noqa: E402
from vinoopt.distillation.losses import output_loss  # noqa: E402
from vinoopt.distillation.quantizers import Grid, fake_quantize  # noqa: E402
from vinoopt.distillation.school import open_school  # noqa: E402
from vinoopt.distillation.standing import Standing  # noqa: E402
from vinoopt.distillation.training import is_near  # noqa: E402
from vinoopt.errors import DataError, DistillationError, InputError  # noqa: E402
from vinoopt.records import Device, DistillationPlan, Event, QuantizationPlan, TensorSpec  # noqa: E402

SIDE, CLASSES = 16, 5
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(96, 3, SIDE, SIDE)).astype(np.float32)


def network(width: int = 8, seed: int = 0, weights: Mapping[str, Any] | None = None) -> ov.Model:
    """A residual classifier with random weights; `weights` of another one keep its first channels."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}

    def constant(name: str, *shape: int) -> ov.Node:
        scale = (2 / np.prod(shape[1:])) ** 0.5
        values = (rng.normal(size=shape) * scale).astype(np.float32)
        if weights is not None:
            values = weights[name][tuple(slice(size) for size in shape)]
        made[name] = values
        node = op.constant(values)
        node.set_friendly_name(name)
        return node

    def conv(x: Any, name: str, inputs: int, outputs: int) -> Any:
        x = op.convolution(x, constant(f"{name}.w", outputs, inputs, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
        x.set_friendly_name(name)
        return op.add(x, constant(f"{name}.b", 1, outputs, 1, 1))

    x = op.parameter([1, 3, SIDE, SIDE], np.float32, name="x")
    x.output(0).set_names({"x"})
    stem = op.relu(conv(x, "stem", 3, 8))
    inner = op.relu(conv(stem, "a", 8, width))
    joined = op.add(conv(inner, "b", width, 8), stem)
    joined.set_friendly_name("join")
    pooled = op.reduce_mean(op.relu(joined), op.constant(np.array([2, 3])), True)
    pooled = op.reshape(pooled, op.constant([1, 8]), False)
    logits = op.matmul(pooled, constant("head", 8, CLASSES), False, False)
    logits.output(0).set_names({"logits"})
    model = ov.Model([logits], [x], "net")
    network.made = made  # type: ignore[attr-defined]
    return model


def pair() -> tuple[ov.Model, ov.Model]:
    """A float teacher, and a student with half of its inner channels, in INT8."""
    teacher = network()
    student = network(4, weights=network.made)  # type: ignore[attr-defined]
    return teacher, quantize(student, QuantizationPlan(subset_size=32), data(), device=Device.CPU)


def data() -> Any:
    return from_arrays(IMAGES, inputs=[TensorSpec(name="x", shape=(1, 3, SIDE, SIDE), dtype="float32")])


def bytes_of(model: ov.Model) -> list[bytes]:
    return [n.get_data().tobytes() for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]


def distilled(steps: int = 60, **options: Any) -> Distilled:
    teacher, student = pair()
    settings = {"batch": 16, "threads": 1, "steps": steps, **options}
    return vinoopt.distill(student, teacher=teacher, data=IMAGES, **settings)


def test_a_pruned_quantized_model_comes_nearer_to_its_teacher_and_stays_quantized() -> None:
    events: list[Event] = []
    teacher, student = pair()
    result = vinoopt.distill(student, teacher=teacher, data=IMAGES, steps=80, batch=16, on_event=events.append)
    assert result.is_better
    assert result.after < 0.7 * result.before
    kinds = [[n.get_type_name() for n in model.get_ordered_ops()] for model in (student, result.model)]
    assert kinds[0] == kinds[1] and "FakeQuantize" in kinds[1]
    stored = [n for n in result.model.get_ops() if n.get_element_type().get_type_name() == "i8"]
    assert stored, "weights stay in eight bits"
    assert bytes_of(student) == bytes_of(pair()[1]), "the model that was handed in is left alone"
    assert events[-1].done == events[-1].total == 80
    assert "agreement" in events[-1].message and "held back" in events[-1].message
    assert any("s left" in event.message for event in events)
    assert any("agreement" in event.message for event in events if 0 < event.done < 30), "told early"


def test_the_same_seed_gives_the_same_model() -> None:
    first, again, other = (distilled(20, seed=seed) for seed in (1, 1, 2))
    assert bytes_of(first.model) == bytes_of(again.model)
    assert bytes_of(first.model) != bytes_of(other.model)


def test_bfloat16_comes_as_near_and_is_left_out_where_it_would_drown_what_is_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def results(student: ov.Model, steps: int) -> list[Distilled]:
        found = []
        for has in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
            options = {"steps": steps, "batch": 16, "threads": 1, "peak_rate": 0.003}
            found.append(vinoopt.distill(student, teacher=network(), data=IMAGES, **options))
        return found

    halved, exact = results(pair()[1], 60)
    assert bytes_of(halved.model) != bytes_of(exact.model)
    assert halved.is_better and halved.after < 1.25 * exact.after
    assert halved.outcome.best_loss < 1.1 * exact.outcome.best_loss
    teacher = network()
    near = network(weights={name: 1.0001 * value for name, value in network.made.items()})  # type: ignore[attr-defined]
    assert bytes_of(near) != bytes_of(teacher)
    halved, exact = results(near, 10)
    assert bytes_of(halved.model) == bytes_of(exact.model)


def test_it_never_returns_something_worse() -> None:
    result = distilled(20, peak_rate=30.0)
    assert not result.is_better
    assert result.after == result.before
    assert "kept as it was" in result.reason
    assert bytes_of(result.model) == bytes_of(pair()[1])


def test_the_time_limit_is_kept() -> None:
    result = distilled(100_000, time_limit_s=4.0)
    assert result.outcome.reason in ("time limit", "no better for a while")
    assert 0 < result.outcome.steps < 100_000
    assert result.outcome.seconds < 8


def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "run.pt"
    monkeypatch.setattr("vinoopt.distillation.training._CHECKPOINT_S", 0.0)

    def cut(event: Event) -> None:
        if event.done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(24, checkpoint=place, on_event=cut)
    assert place.is_file()
    steps: list[int] = []
    resumed = distilled(24, checkpoint=place, on_event=lambda event: steps.append(event.done))
    assert next(step for step in steps if step) >= 12, "no step is taken twice"
    assert bytes_of(resumed.model) == bytes_of(distilled(24).model)
    assert not place.exists(), "a finished run leaves no checkpoint"


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    place = tmp_path / "run.pt"
    place.write_bytes(b"not a checkpoint")
    assert bytes_of(distilled(10, checkpoint=place).model) == bytes_of(distilled(10).model)


def test_early_stopping_watches_the_held_back_inputs() -> None:
    teacher = network()
    result = vinoopt.distill(
        teacher.clone(), teacher=teacher, data=IMAGES, steps=100, batch=16, threads=1, peak_rate=1e-9
    )
    assert result.outcome.reason == "no better for a while"
    assert result.outcome.steps < 100
    assert result.outcome.best_step == 0
    assert not result.is_better


def test_an_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "run.pt"

    def cut(event: Event) -> None:
        if event.done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(24, checkpoint=place, on_event=cut)
    assert bytes_of(distilled(24, checkpoint=place).model) == bytes_of(distilled(24).model)


@pytest.mark.parametrize("what", ["teacher", "data", "student", "damaged"])
def test_a_checkpoint_of_other_material_is_not_taken(what: str, tmp_path: Path) -> None:
    place = tmp_path / "run.pt"
    teacher, student = pair()
    options: dict[str, Any] = {"steps": 12, "batch": 16, "threads": 1, "augment": False}

    def cut(event: Event) -> None:
        if event.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vinoopt.distill(student, teacher=teacher, data=IMAGES, checkpoint=place, on_event=cut, **options)
    if what == "damaged":
        state = torch.load(place, weights_only=True)
        state["best"][0] = state["best"][0][:1]
        torch.save(state, place)
    steps: list[int] = []
    vinoopt.distill(
        network(4, seed=7) if what == "student" else student,
        teacher=network(seed=7) if what == "teacher" else teacher,
        data=IMAGES * 1.5 if what == "data" else IMAGES,
        checkpoint=place,
        on_event=lambda event: steps.append(event.done),
        **options,
    )
    assert min(step for step in steps if step) == 1, "the run begins anew"


def test_whole_numbers_alone_are_refused() -> None:
    teacher, student = pair()
    for model in (teacher, student):
        best = op.topk(model.outputs[0].get_node().input_value(0), op.constant(1), 1, "max", "value").output(1)
        result = op.result(best)
        model.add_results([result])
        model.remove_result(model.get_results()[0])
    with pytest.raises(DistillationError, match="whole numbers"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES)


def test_an_error_of_pytorch_is_ours_and_leaves_the_model_alone() -> None:
    def broken(inputs: Any, generator: Any) -> list[Any]:
        return [inputs[0][:, :2]]

    teacher, student = pair()
    before = bytes_of(student)
    with pytest.raises(DistillationError, match=r"Convolution.*stem"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES, steps=5, augment=broken)
    assert bytes_of(student) == before


def test_a_limited_run_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vinoopt.distillation.training._PATIENT", 2.0)  # nothing but time ends it
    place = tmp_path / "run.pt"
    first = distilled(100_000, time_limit_s=2.0, checkpoint=place)
    assert first.outcome.is_cut, first.reason
    steps: list[int] = []

    def watch(event: Event) -> None:
        steps.append(event.done)
        if any(steps):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(100_000, time_limit_s=2.0, checkpoint=place, on_event=watch)
    assert steps[-1] > first.outcome.steps, "one that begins anew tells of its first twentieth"


def test_an_interrupt_within_a_step_takes_no_input_away(tmp_path: Path) -> None:
    calls = 0
    place = tmp_path / "run.pt"

    def noisy(inputs: Any, generator: Any) -> Any:
        return [x + 0.1 * torch.randn(x.shape, generator=generator) for x in inputs]

    def cut(inputs: Any, generator: Any) -> Any:
        nonlocal calls
        calls += 1
        changed = noisy(inputs, generator)
        if calls == 15:
            raise KeyboardInterrupt
        return changed

    with pytest.raises(KeyboardInterrupt):
        distilled(24, checkpoint=place, augment=cut)
    resumed = distilled(24, checkpoint=place, augment=noisy)
    assert bytes_of(resumed.model) == bytes_of(distilled(24, augment=noisy).model)


def test_a_checkpoint_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vinoopt.distillation.training._CHECKPOINT_S", 0.0)
    (tmp_path / "run.part").mkdir()
    result = distilled(24, checkpoint=tmp_path / "run.pt")
    assert "no checkpoint was written" in result.reason
    assert bytes_of(result.model) == bytes_of(distilled(24).model)
    with pytest.raises(InputError, match="is a folder"):
        distilled(24, checkpoint=tmp_path)


def test_outputs_in_half_precision_are_compared_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(model: ov.Model) -> ov.Model:
        """With outputs that are shares too small for half precision."""
        model = model.clone()
        (result,) = model.get_results()
        scores = op.multiply(result.input_value(0), op.constant(np.float32(40)))
        shares = op.convert(op.softmax(scores, 1), "f16")
        model.add_results([op.result(shares)])
        model.remove_result(result)
        return model

    teacher, student = map(halved, pair())
    result = vinoopt.distill(student, teacher=teacher, data=IMAGES, steps=80, batch=16, threads=1)
    assert result.is_better, result.reason
    assert 0 < result.after < result.before < math.inf
    assert "agreement" in result.reason
    monkeypatch.setattr("vinoopt.distillation.equality.STORED_TOLERANCE", 1e-9)
    with pytest.raises(DistillationError, match=r"departs .* \(tolerance 1e-09\)"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES, steps=80)


def test_ports_in_another_order_are_refused() -> None:
    def with_two(model: ov.Model, order: int) -> ov.Model:
        model = model.clone()
        (result,) = model.get_results()
        scores = result.input_value(0)
        heads = [op.add(scores, op.constant(np.float32(shift))) for shift in (0, 1)]
        for name, head in zip("ab", heads, strict=True):
            head.output(0).set_names({name})
        model.remove_result(result)
        model.add_results([op.result(head) for head in heads[::order]])
        return model

    teacher, student = pair()
    with pytest.raises(DistillationError, match="output 'b' is number 0 of the model and number 1 of its teacher"):
        vinoopt.distill(with_two(student, -1), teacher=with_two(teacher, 1), data=IMAGES, steps=5)


def test_too_few_inputs_and_nonsense_are_refused() -> None:
    teacher, student = pair()
    with pytest.raises(DistillationError, match="at least 16"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES[:12])
    calls = from_arrays(IMAGES, inputs=[TensorSpec(name="x", shape=(8, 3, SIDE, SIDE), dtype="float32")])
    with pytest.raises(DistillationError, match=r"12 calls of 8 samples .* at least 16"):
        vinoopt.distill(student, teacher=teacher, data=calls)
    for wrong in ({"batch": 0}, {"steps": 0}, {"labels": "labels.npy"}, {"threads": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            vinoopt.distill(student, teacher=teacher, data=IMAGES, **wrong)
    with pytest.raises(InputError, match=r"ov\.Model"):
        vinoopt.distill("student.xml", teacher=teacher, data=IMAGES)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 to 5, and the first output has 5 classes"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES, labels=np.arange(len(IMAGES)) % 6)


@pytest.mark.parametrize("names", [{"picture"}, set()])
def test_inputs_are_named_as_the_model_names_them(names: set[str]) -> None:
    teacher, student = pair()
    for model in (teacher, student):
        model.input(0).set_names(names)
    result = vinoopt.distill(student, teacher=teacher, data=IMAGES, steps=5, batch=16, threads=1)
    assert result.outcome.steps == 5


def test_values_that_are_no_scores_are_compared_as_values() -> None:
    said: list[str] = []
    distilled(5, are_scores=False, on_event=lambda event: said.append(event.message))
    assert any("held back" in line for line in said)
    assert not any("agreement" in line for line in said)


def test_slopes_that_are_not_finite_are_not_followed() -> None:
    def rooted() -> ov.Model:
        """A root of zero beside the class scores: it has a value, but no slope."""
        model = network()
        scores = model.get_results()[0].input_value(0)
        nothing = op.relu(op.subtract(scores, op.constant(np.float32(1e6))))
        named = op.add(scores, op.sqrt(nothing))
        named.output(0).set_names({"sum"})
        return ov.Model([named], model.get_parameters(), "rooted")

    result = vinoopt.distill(rooted(), teacher=rooted(), data=IMAGES, steps=10, batch=16, threads=1)
    assert result.outcome.steps == 10
    assert not result.is_better
    assert bytes_of(result.model) == bytes_of(rooted())


def test_a_step_that_memory_has_no_room_for_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distilled(12, augment=False)
    monkeypatch.setattr("vinoopt.distillation.distiller.STEP_BYTES", 400_000)
    parts = distilled(12, augment=False)
    assert parts.after == pytest.approx(whole.after, rel=0.05)
    assert bytes_of(parts.model) != bytes_of(whole.model), "sums are taken in another order"


def test_other_ports_than_the_teachers_are_refused() -> None:
    teacher, student = pair()
    student.add_outputs([("a", 0)])
    with pytest.raises(DistillationError, match="its teacher"):
        vinoopt.distill(student, teacher=teacher, data=IMAGES)


def test_labels_count_only_where_they_are_given() -> None:
    labels = RNG.integers(0, CLASSES, len(IMAGES))
    without, given, other = (distilled(10, **o) for o in ({}, {"labels": labels}, {"labels": labels[::-1].copy()}))
    assert without.plan.label_weight == 0 < given.plan.label_weight
    assert len({tuple(bytes_of(each.model)) for each in (without, given, other)}) == 3


def test_a_function_of_the_user_may_alter_the_inputs() -> None:
    seen: list[tuple[int, ...]] = []

    def fade(inputs: Any, generator: Any) -> list[Any]:
        seen.append(tuple(inputs[0].shape))
        return [inputs[0] * torch.rand((), generator=generator)]

    distilled(5, augment=fade)
    assert seen == [(16, 3, SIDE, SIDE)] * 5


# --------------------------------------------------------------------------- parts


def test_ranges_learn_what_finite_differences_say() -> None:
    grid = Grid.of(*(torch.tensor(v) for v in (0.0, 2.55, 0.0, 2.55)), levels=256)
    x = torch.tensor([-0.4, 0.013, 1.204, 2.0, 3.1], requires_grad=True)
    theta = torch.zeros((), requires_grad=True)
    fake_quantize(x, theta, grid).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    y = fake_quantize(x.detach(), torch.zeros(()), grid)
    inside = torch.tensor([0.0, 1, 1, 1, 0])
    assert theta.grad.item() == pytest.approx(float((y - x.detach() * inside).sum()), abs=1e-5)
    # Clipped values follow the range's end: the only part of the derivative that exists in the strict sense.
    h = 1e-3
    far = torch.tensor([9.0])
    ends = [fake_quantize(far, torch.tensor(t), grid).item() for t in (-h, h)]
    assert (ends[1] - ends[0]) / (2 * h) == pytest.approx(2.55, rel=1e-3)


def test_the_upper_end_of_a_skewed_range_learns_for_itself() -> None:
    step, zero = 0.02, 30
    grid = Grid.of(*(torch.tensor(v * step) for v in (-zero, 255 - zero, -zero, 255 - zero)), levels=256)
    assert grid.is_skewed
    low, high = float(grid.low), float(grid.high)
    x = torch.tensor([low - 1, -0.2, 0.513, 2.0, high + 1])
    slopes = torch.tensor([3.0, 5.0, 7.0, 11.0, 13.0])
    theta, phi = (torch.zeros((), requires_grad=True) for _ in range(2))
    y = fake_quantize(x, theta, grid, phi=phi)
    assert torch.allclose(y, fake_quantize(x, torch.zeros(()), grid))
    (slopes * y).sum().backward()
    rounding = (slopes * (y - x))[1:4].sum().item()
    assert phi.grad.item() == pytest.approx(rounding * high / (high - low) + 13 * high, abs=1e-4)
    assert theta.grad.item() == pytest.approx(rounding + 13 * high + 3 * low, abs=1e-4)
    narrower = fake_quantize(x, torch.zeros(()), grid, phi=torch.tensor(-0.5))
    assert float(narrower[-1]) == pytest.approx(high * math.exp(-0.5), abs=0.02)
    assert float(narrower[0]) == pytest.approx(low, abs=0.01), "the lower end stays, to half a level"
    assert 0 in fake_quantize(torch.zeros(1), torch.zeros(()), grid, phi=torch.tensor(-0.5))
    alone = torch.tensor(0.513, requires_grad=True)
    fake_quantize(alone, theta, grid, phi=phi).backward()
    assert alone.grad.item() == 1, "a scalar has no samples"
    for ends in ((-2.56, 2.54), (-2.55, 2.55), (0.0, 5.1)):
        assert not Grid.of(*(torch.tensor(v) for v in (*ends, *ends)), levels=256).is_skewed


def test_the_range_of_weights_learns_from_all_of_them() -> None:
    grid = Grid.of(*(torch.tensor(v) for v in (-1.28, 1.27, -1.28, 1.27)), levels=256)
    x = torch.randn((16, 3), generator=torch.Generator().manual_seed(0))
    slopes = torch.linspace(-1, 3, 16)[:, None]
    found = []
    for has_samples in (False, True):
        theta = torch.zeros((), requires_grad=True)
        (slopes * fake_quantize(x, theta, grid, has_samples=has_samples)).sum().backward()
        found.append(float(theta.grad))
    inside = ((x >= -1.28) & (x <= 1.27)).float()
    whole = slopes * (fake_quantize(x, torch.zeros(()), grid) - x * inside)
    assert found[0] == pytest.approx(float(whole.sum()), abs=1e-4)
    assert found[1] == pytest.approx(8 * float(whole[:2].sum()), abs=1e-4), "samples are drawn from"


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1, 3, 32, 32), (2, 3)),
        ((8, 32, 32, 3), (1, 2)),
        ((1, 1, 28, 28), (2, 3)),
        ((1, 3, 8, 8), None),
        ((1, 64, 32, 32), None),
        ((1, 4096), None),
    ],
)
def test_images_are_told_from_other_inputs(shape: tuple[int, ...], axes: tuple[int, int] | None) -> None:
    assert image_axes(shape) == axes
    image = torch.zeros(shape, dtype=torch.uint8)
    assert (find_augment([image]) is None) is (axes is None)
    assert find_augment([image, image]) is None
    is_surely_one = axes is not None and 3 in (shape[1], shape[3])
    assert (find_augment([image.float()]) is not None) is is_surely_one, "one channel of floats may be a spectrogram"


def test_altered_images_stay_in_range_and_follow_the_seed() -> None:
    augment = find_augment([torch.zeros((1, SIDE, SIDE, 3))])
    assert augment is not None
    images = torch.from_numpy(RNG.integers(0, 256, (8, SIDE, SIDE, 3)))
    once, twice, other = (augment([images], torch.Generator().manual_seed(s))[0] for s in (0, 0, 1))
    assert torch.equal(once, twice) and not torch.equal(once, other)
    assert once.shape == images.shape and once.is_floating_point()
    assert float(once.min()) >= 0 and float(once.max()) <= 255


def test_losses_are_zero_for_equal_outputs_and_scale_free() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, scores, vectors = (torch.randn(shape, generator=generator) for shape in ((6, 40, 4), (6, 10), (6, 1)))
    kinds = {
        "boxes": (boxes, output_loss(boxes)),
        "vectors": (vectors, output_loss(vectors)),
        "logits": (scores, output_loss(3 * scores)),
        "before a softmax": (scores, output_loss(scores, ending="Softmax", is_finished=False)),
        "behind a softmax": (scores.softmax(-1), output_loss(scores.softmax(-1), ending="Softmax")),
        "before a sigmoid": (scores, output_loss(scores, ending="Sigmoid", is_finished=False)),
        "behind a sigmoid": (scores.sigmoid(), output_loss(scores.sigmoid(), ending="Sigmoid")),
    }
    for title, (values, loss) in kinds.items():
        assert float(loss(values, values)) == pytest.approx(0, abs=1e-6), title
        other = values + torch.randn(values.shape, generator=generator)
        other = other.softmax(-1) if title == "behind a softmax" else other
        other = other.sigmoid() if title == "behind a sigmoid" else other
        assert float(loss(other, values)) > 1e-3, title
    large = output_loss(1000 * boxes)
    assert float(large(1001 * boxes, 1000 * boxes)) == pytest.approx(
        float(output_loss(boxes)(1.001 * boxes, boxes)), rel=1e-3
    )


def test_a_divergence_before_and_behind_the_sigmoid_is_the_same() -> None:
    own, its = torch.randn((2, 6, 10), generator=torch.Generator().manual_seed(0))
    before = output_loss(its, ending="Sigmoid", is_finished=False)
    behind = output_loss(its.sigmoid(), ending="Sigmoid")
    assert float(before(own, its)) == pytest.approx(float(behind(own.sigmoid(), its.sigmoid())), rel=1e-4)


DETECTORS = ("objectness", "classes alone", "rows last", "coefficients behind")
"""How detectors write their rows."""


def detections(kind: str) -> tuple[Any, Any]:
    """What a detector says of 4 images, [4, 200, 4 + ...] or rows last, and its objects: 10 of 200 rows."""
    generator = torch.Generator().manual_seed(0)
    boxes = 50 * torch.rand((4, 200, 4), generator=generator)
    is_object = (torch.arange(200) % 20 == 7)[:, None]
    classes = torch.nn.functional.one_hot(torch.randint(6, (4, 200), generator=generator), 6) * 0.9
    objectness = torch.where(is_object, 0.8, 1e-3).expand(4, 200, 1)
    parts = [boxes, objectness, classes] if kind == "objectness" else [boxes, classes * objectness]
    if kind == "coefficients behind":
        parts += [torch.randn((4, 200, 3), generator=generator), torch.full((4, 200, 1), 7.0)]
    rows = torch.cat(parts, -1)
    return (rows.transpose(1, 2), is_object.T) if kind == "rows last" else (rows, is_object)


def layout_of(rows: Any, *, ending: Any = op.sigmoid) -> Any:
    """What the rows are taken for where `ending` makes the scores among them."""
    boxes, scores = op.parameter([4, 200, 4], np.float32), op.parameter([4, 200, 6], np.float32)
    result = op.result(op.transpose(op.concat([boxes, ending(scores)], 2), [0, 2, 1]))
    return find_detector(result, rows)


@pytest.mark.parametrize("kind", DETECTORS)
def test_of_a_detector_counts_what_it_sees(kind: str) -> None:
    rows, is_object = detections(kind)
    layout = layout_of(rows)
    assert layout is not None and layout.has_objectness == (kind == "objectness")
    loss = output_loss(rows, detector=layout)
    assert float(loss(rows, rows)) == pytest.approx(0, abs=1e-6)
    axis = 1 if kind == "rows last" else 2
    for column in range(rows.shape[axis]):
        disturbed = rows.clone()
        disturbed.select(axis, column).mul_(0.8)
        seen, unseen = (float(loss(torch.where(where, disturbed, rows), rows)) for where in (is_object, ~is_object))
        if kind == "coefficients behind" and column == rows.shape[axis] - 1:
            assert seen == unseen == 0, "the same everywhere"
        else:
            assert seen > 1e-4, column
            assert seen > 10 * unseen, column


def test_a_detector_s_loss_has_slopes_at_every_score() -> None:
    rows, _ = detections("objectness")
    loss = output_loss(rows, detector=layout_of(rows))
    own = rows.clone()
    own[..., 4:][torch.rand(own[..., 4:].shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0
    own[:, :20, 4:] = 1.0
    own.requires_grad_(True)
    loss(own, rows).backward()
    assert bool(torch.isfinite(own.grad).all()) and float(own.grad.abs().max()) < 1e3
    halved = output_loss(rows.half(), detector=layout_of(rows))
    assert math.isfinite(float(halved(100 * rows.half(), rows.half())))


def test_rows_that_are_no_detector_s_count_alike() -> None:
    rows, is_object = detections("objectness")
    for others in (rows / 50, rows[..., :4], 50 * rows, rows.unsqueeze(1), rows[:, :0]):
        assert layout_of(others) is None
    assert layout_of(rows, ending=op.relu) is None
    loss = output_loss(rows)
    shifted = rows + 0.1 * rows.std()
    seen, unseen = (float(loss(torch.where(where, shifted, rows), rows)) for where in (is_object, ~is_object))
    assert unseen == pytest.approx(19 * seen, rel=1e-3)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_what_is_no_class_score_may_not_be_shifted(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn((32, 10), generator=generator)
    assert float(output_loss(scores)(scores + scale, scores)) > 1e-2
    sure = output_loss(scores, ending="Softmax", is_finished=False)
    assert float(sure(scores + scale, scores)) == pytest.approx(0, abs=1e-5), "a softmax does not see it"


@pytest.mark.parametrize(("lost", "gained", "is_doubted"), [(5, 4, False), (20, 2, True), (2, 20, False)])
def test_a_nearer_model_is_doubted_only_where_it_lost_more_decisions_than_chance(
    lost: int, gained: int, is_doubted: bool
) -> None:
    count = 150
    distances = np.random.default_rng(0).uniform(0.2, 0.4, count)
    agreements = np.ones(count)
    agreements[:gained] = 0
    after = np.ones(count)
    after[count - lost :] = 0
    before = Standing(distances=distances, agreements=agreements)
    doubt = Standing(distances=0.7 * distances, agreements=after).doubt_over(before)
    assert ("fewer decisions" in doubt) == is_doubted
    assert Standing(distances=distances, agreements=after).doubt_over(before)  # not nearer
    hardly = Standing(distances=0.9 * distances, agreements=agreements).doubt_over(before)
    assert "10% nearer" in hardly  # for certain, and not worth it


@pytest.mark.parametrize(("far_away", "is_doubted"), [(2.1, False), (2.3, True), (1.0, False)])
def test_one_input_far_away_does_not_hide_that_the_others_came_nearer(far_away: float, is_doubted: bool) -> None:
    distances = np.random.default_rng(0).uniform(0.02, 0.04, 16)
    before, after = np.append(distances, 2.0), np.append(0.6 * distances, far_away)
    doubt = Standing(distances=after, agreements=None).doubt_over(Standing(distances=before, agreements=None))
    assert bool(doubt) == is_doubted
    mixed = np.append(distances * np.where(np.arange(16) % 2, 0.6, 1.6), 1.9)
    assert mixed.mean() < before.mean()
    assert Standing(distances=mixed, agreements=None).doubt_over(Standing(distances=before, agreements=None))


def test_a_channel_of_small_weights_is_moved_in_its_own_measure() -> None:
    teacher = network()
    weights = {name: value.copy() for name, value in network.made.items()}  # type: ignore[attr-defined]
    weights["a.w"][0] *= 0.01
    weights["a.b"][0, 0] = 1.0  # alive
    student = network(weights=weights)
    plan = DistillationPlan(runs=(10,), batch=16, peak_rate=0.01)
    trained = train(student, open_school(teacher, data(), seed=0), plan, Run(threads=1, is_judged_later=True)).model
    after = next(node for node in trained.get_ops() if node.get_friendly_name() == "a.w").get_data()
    change, size = (np.sqrt(np.square(x).mean((1, 2, 3))) for x in (after - weights["a.w"], weights["a.w"]))
    shares = change / size
    assert 0 < shares[0] < 3 * shares[1:].max()


@pytest.mark.parametrize(
    ("losses", "is_as_good"),
    [
        ([0.9, 1.9, 2.9, 3.9], True),
        ([0.9, 1.9, 2.9, 4.5], True),  # one of the four
        ([1.2, 2.2, 3.1, 4.1], False),  # all of them
        ([1.0, 2.0, 3.0, 4.0], False),  # the same: nothing was learned
        ([0.9, 1.9, 2.9, math.inf], False),
    ],
)
def test_a_later_state_is_as_good_within_a_standard_error(losses: list[float], is_as_good: bool) -> None:
    assert is_near(losses, [1.0, 2.0, 3.0, 4.0]) == is_as_good


def test_a_rate_that_raises_the_loss_is_lowered() -> None:
    plan = DistillationPlan(runs=(300,), batch=16, peak_rate=0.1)
    school = open_school(network(), data(), seed=0)
    outcome = train(network(), school, plan, Run(threads=1, is_judged_later=True)).outcome
    assert 0 < outcome.best_loss < 2e-4, "7e-4 where the rate stays, 2e-5 where it falls"


@pytest.mark.parametrize(
    ("runs", "rate"),
    [
        ((1500,), 0.01),
        ((150,), 0.005),
        ((20,), 0.005),
        ((150, 1200), 0.005),
        ((150, 1200, 1000), 0.0025),
    ],
)
def test_short_runs_and_later_ones_go_more_slowly(runs: tuple[int, ...], rate: float) -> None:
    assert last_rate(DistillationPlan(runs=runs, peak_rate=0.01)) == pytest.approx(rate)


def test_ranges_are_fitted_where_weights_hardly_move() -> None:
    def ends(model: ov.Model) -> np.ndarray[Any, Any]:
        quantizers = [n for n in model.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
        found = [n.input_value(2).get_node().get_data() for n in quantizers]
        return np.array([value.item() for value in found if value.size == 1])

    teacher, student = network(), quantize(network(), QuantizationPlan(subset_size=32), data(), device=Device.CPU)
    plan = DistillationPlan(runs=(40,), batch=16, peak_rate=1e-6)
    given = train(student, open_school(teacher, data(), seed=0), plan, Run(threads=1, is_judged_later=True))
    moved = np.abs(np.log(ends(given.model) / ends(student)))
    assert len(moved) > 2
    assert moved.max() > 2e-3


def test_what_others_judge_later_comes_out_trained() -> None:
    teacher = network()
    school = open_school(teacher, data(), seed=0)
    plan = DistillationPlan(runs=(20,), batch=16, peak_rate=0.5)
    kept = train(teacher.clone(), school, plan, Run(threads=1))
    assert not kept.is_better and bytes_of(kept.model) == bytes_of(teacher)
    given = train(teacher.clone(), school, plan, Run(threads=1, is_judged_later=True))
    assert bytes_of(given.model) != bytes_of(teacher)
    assert given.outcome.best_step > 0


def attentive(shift: float = 0.0) -> ov.Model:
    """A classifier of sequences of any length whose places can be masked out, the mask minus infinity."""
    rng = np.random.default_rng(5)

    def weights(*shape: int) -> ov.Node:
        values = rng.normal(size=shape, scale=0.5) + shift * rng.normal(size=shape)
        return op.constant(values.astype(np.float32))

    x, live = op.parameter([1, -1, 8], np.float32, name="x"), op.parameter([1, -1], np.float32, name="live")
    x.output(0).set_names({"x"})
    live.output(0).set_names({"live"})
    h = op.add(x, op.tanh(op.matmul(x, weights(8, 8), False, False)))
    bias = op.unsqueeze(op.log(live), op.constant(1))  # 0 or minus infinity
    scores = op.add(op.matmul(h, h, False, True), bias)
    h = op.add(h, op.matmul(op.matmul(op.softmax(scores, -1), h, False, False), weights(8, 8), False, False))
    logits = op.matmul(op.reduce_mean(h, op.constant(1), False), weights(8, CLASSES), False, False)
    return ov.Model([logits], [x, live], "attentive")


def sequences(lengths: Any) -> Dataset:
    rng = np.random.default_rng(1)
    calls = [
        {
            "x": rng.normal(size=(1, length, 8)).astype(np.float32),
            "live": (np.arange(length)[None] < length - length // 4).astype(np.float32),
        }
        for length in lengths
    ]
    return Dataset(reader=calls)


@pytest.mark.parametrize("lengths", [[4 + n % 5 for n in range(48)], [6] * 3 + [4 + n % 5 for n in range(45)]])
def test_sequences_of_different_lengths_are_learnt_from_and_masks_are_left_alone(lengths: list[int]) -> None:
    settings = {"steps": 60, "batch": 8, "threads": 1, "peak_rate": 0.01}
    result = vinoopt.distill(attentive(0.05), teacher=attentive(), data=sequences(lengths), **settings)
    assert result.is_better
    assert result.outcome.best_loss < 0.5 * result.outcome.first_loss
    names = {node.get_type_name() for node in result.model.get_ops()}
    assert {"Softmax", "Log"} <= names


def test_open_sizes_do_not_hide_how_much_a_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vinoopt.distillation.distiller.STEP_BYTES", 2 << 20)
    teacher, student = network(), network(seed=1)
    for model in (teacher, student):
        model.reshape({0: ov.PartialShape([-1, 3, SIDE, SIDE])})
        for node in model.get_ops():  # the graph is made for one call otherwise
            if node.get_type_name() == "Reshape":
                node.input(1).replace_source_output(op.constant([-1, 8]).output(0))
        model.validate_nodes_and_infer_types()
    seen: list[int] = []

    def watch(inputs: Any, generator: Any) -> Any:
        seen.append(len(inputs[0]))
        return list(inputs)

    vinoopt.distill(student, teacher=teacher, data=data(), steps=4, batch=64, augment=watch, threads=1)
    assert 1 <= max(seen) < 48


def test_labels_of_a_dataset_are_asked_for() -> None:
    teacher, student = pair()
    labelled = from_arrays(
        IMAGES,
        inputs=[TensorSpec(name="x", shape=(1, 3, SIDE, SIDE), dtype="float32")],
        labels=RNG.integers(0, CLASSES, len(IMAGES)),
    )
    settings = {"teacher": teacher, "data": labelled, "steps": 4, "batch": 16, "threads": 1}
    plans = [vinoopt.distill(student, **settings, labels=labels).plan for labels in (None, True)]
    assert [plan.label_weight for plan in plans] == [0.0, 0.3]
    with pytest.raises(InputError, match="labels=True"):
        vinoopt.distill(student, **settings, labels=[1, 2])
    with pytest.raises(InputError, match="of a Dataset"):
        vinoopt.distill(student, **{**settings, "data": IMAGES}, labels=True)


def test_maps_behind_a_softmax_have_the_divergence_of_every_place() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn((2, 4, 6, 5), generator=generator)
    before = output_loss(maps, ending="Softmax", class_axis=1, is_finished=False)
    behind = output_loss(maps.softmax(1), ending="Softmax", class_axis=1)
    other = maps + 0.3 * torch.randn(maps.shape, generator=generator)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(1), maps.log_softmax(1), reduction="sum", log_target=True
    ) / (2 * 6 * 5)
    assert float(before(other, maps)) == pytest.approx(float(expected), rel=1e-5)
    assert float(behind(other.softmax(1), maps.softmax(1))) == pytest.approx(float(expected), rel=1e-4)
    assert float(before(other + 1.5, maps)) == pytest.approx(float(expected), rel=1e-4), "a shift is not seen"
    assert before.agreement is not None and 0.5 < float(before.agreement(other, maps)) < 1


def test_scores_that_are_ruled_out_count_nothing() -> None:
    scores = torch.tensor([[1.0, 2.0, -math.inf], [3.0, 0.5, -math.inf]])
    loss = output_loss(scores)
    assert float(loss(scores, scores)) == 0
    other = (scores + torch.tensor([0.2, -0.2, 0.0])).requires_grad_()
    value = loss(other, scores)
    value.backward()
    assert 0 < float(value.detach()) < 1
    assert bool(torch.isfinite(other.grad).all())
