"""From a compressed `ov.Model` and its float teacher to a better one, or to the same one with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.distillation.augment import Augment, find_augment
from vinoopt.distillation.equality import check_batches, check_equality
from vinoopt.distillation.losses import Loss, output_loss, relative_error
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.training import Batch, Material, Outcome, Progress, Training, TrainingSettings
from vinoopt.distillation.weights import Key
from vinoopt.errors import DataError, DistillationError
from vinoopt.records import DistillationPlan

HELD_SHARE, MOST_HELD = 0.1, 256
"""Of the inputs, to be looked at only: a share, and at most so many calls."""
LEAST_HELD, MOST_SHARE = 16, 0.25
"""So many calls are looked at where that is no more than this share: with fewer the best state is found by chance."""
LEAST_INPUTS = 16
_CHECKED = 4
"""Calls on which a mirror has to equal OpenVINO."""
_EXAMPLES = 32
"""Calls on which the spread of the teacher's values is taken."""
_JOINS = frozenset({"Add"})
_MOST_INNER = 6
_PACE_STEPS = 8
_LATER_RATE = 0.4
"""Peak rate of a run, over that of the run before it, whose end it must not undo."""
Say = Callable[[str, int, int], None]
"""A message, steps done and steps in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """A trained model, or the model as it was."""

    model: ov.Model
    plan: DistillationPlan
    before: float
    """Divergence from the teacher on the held-back inputs, as OpenVINO computes both."""
    after: float
    is_better: bool
    """False: the model is the one that was handed in, since training did not make it better."""
    reason: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one training run may use beside its plan."""

    deadline: float | None = None
    """In `time.monotonic` seconds."""
    checkpoint: Path | None = None
    augment: Augment | None = None
    """None: images are altered where the plan says so; a function of the user's goes first."""
    threads: int | None = None
    say: Say = lambda message, done, total: None


def train(student: ov.Model, teacher: ov.Model, data: Dataset, plan: DistillationPlan, run: Run) -> Distilled:
    """`student` after the last run of `plan`, trained towards `teacher` on the inputs of `data`.

    Never worse than it was: what counts is the divergence of the outputs on held-back inputs, computed by
    OpenVINO as deployed. Raises `DistillationError` for an operator without a rule, for a mirror that does not
    equal OpenVINO, and for too few inputs.
    """
    inputs, held_calls, held = _parts(student, data, plan.seed)
    labels = _labels(data, plan)
    work = student.clone()
    mirror, master = Mirror(work), Mirror(teacher.clone(), trains=False)
    check_equality(mirror, inputs[:_CHECKED])
    check_equality(master, inputs[:_CHECKED])
    material = replace(
        _material(mirror, master, inputs, held_calls, plan, run), labels=labels, label_weight=plan.label_weight
    )
    for each in (mirror, master):
        each.place(_device())
    reference = predict(teacher, held, properties={"INFERENCE_PRECISION_HINT": "f32"})
    departure = _departure(reference)
    before = departure(predict(student, held))
    run.say(f"training on {len(inputs)} inputs, {len(held_calls)} held back", 0, plan.runs[-1])
    outcome = Training(
        student=mirror,
        teacher=master,
        material=material,
        settings=TrainingSettings(
            steps=plan.runs[-1],
            batch=plan.batch,
            peak_rate=plan.peak_rate * _LATER_RATE ** (len(plan.runs) - 1),
            inner_weight=plan.inner_weight,
            seed=plan.seed + len(plan.runs) - 1,
            threads=run.threads,
        ),
        deadline=run.deadline,
        checkpoint=run.checkpoint,
        signature=plan.model_dump_json(),
        on_progress=lambda progress: run.say(progress_words(progress), progress.step, progress.steps),
    ).run()
    mirror.write()
    trained: ov.Model = work.clone()
    after = departure(predict(trained, held))
    is_better = after < before
    reason = (
        f"{outcome.steps} of {plan.runs[-1]} steps ({outcome.reason}): divergence from the float model on "
        f"{len(held_calls)} held-back inputs {before:.4g} before, {after:.4g} after"
    )
    return Distilled(
        model=trained if is_better else student.clone(),
        plan=plan,
        before=before,
        after=after if is_better else before,
        is_better=is_better,
        reason=reason if is_better else f"{reason}: kept as it was",
        outcome=outcome,
    )


def progress_words(progress: Progress) -> str:
    """One line about where a run stands."""
    parts = [f"step {progress.step} of {progress.steps}"]
    if progress.step:
        parts.append(f"loss {progress.loss:.4g}")
    best = f"best {progress.best_loss:.4g}, first {progress.first_loss:.4g}"
    parts.append(f"held back {progress.held_loss:.4g} ({best})")
    if progress.agreement is not None:
        parts.append(f"agreement {progress.agreement:.1%}")
    if progress.step and progress.step < progress.steps:
        parts.append(f"{progress.seconds_left:.0f} s left")
    return ", ".join(parts)


# --------------------------------------------------------------------------- what is learned from


def _parts(student: ov.Model, data: Dataset, seed: int) -> tuple[list[Batch], list[Batch], Dataset]:
    """Inputs to learn from, inputs to look at, and the latter as a dataset."""
    if len(data) < LEAST_INPUTS:
        raise DistillationError(f"{len(data)} inputs are too few to distil from; give at least {LEAST_INPUTS}")
    order, count = _order(data, seed)
    names = [_input_names(parameter) for parameter in student.inputs]
    held = data.subset(order[:count])
    learn = data.subset(order[count:])
    return [_tensors(s, names) for s in learn], [_tensors(s, names) for s in held], held


def _order(data: Dataset, seed: int) -> tuple[np.ndarray[Any, Any], int]:
    """A permutation of the calls, and how many at its beginning are held back."""
    order = np.random.default_rng(seed).permutation(len(data))
    least = min(LEAST_HELD, int(len(data) * MOST_SHARE))
    return order, min(max(int(len(data) * HELD_SHARE), least), MOST_HELD)


def _labels(data: Dataset, plan: DistillationPlan) -> list[Any] | None:
    """Class numbers of the calls to learn from, in their order; None where they are not asked for."""
    if not plan.label_weight:
        return None
    if not isinstance(data.labels, np.ndarray):
        raise DataError("label_weight is about class numbers; give labels, one whole number per sample")
    order, count = _order(data, plan.seed)
    return [torch.as_tensor(data.labels[i], dtype=torch.int64).reshape(-1) for i in order[count:]]


def _input_names(parameter: ov.Output) -> set[str]:
    return {*parameter.get_names(), parameter.get_node().get_friendly_name()}


def _tensors(sample: Any, names: Sequence[set[str]]) -> Batch:
    """The call in the model's order of inputs; whole numbers in 8 bits stay, to save memory."""
    ordered = [next(sample[name] for name in sample if name in known) for known in names]
    return [torch.from_numpy(np.ascontiguousarray(each)) for each in ordered]


def _material(
    student: Mirror, teacher: Mirror, inputs: list[Batch], held: list[Batch], plan: DistillationPlan, run: Run
) -> Material:
    is_batched = check_batches(student, inputs[:3]) and check_batches(teacher, inputs[:3])
    shapes = [tuple(x.shape) for x in inputs[0]]
    augment = run.augment or (find_augment(shapes, mixes=not plan.label_weight) if plan.augments else None)
    student_keys, teacher_keys, are_scores = [], [], []
    for number, (own, its) in enumerate(zip(student.scores, teacher.scores, strict=True)):
        both = own is not None and its is not None
        student_keys.append(own if own is not None and both else student.results[number])
        teacher_keys.append(its if its is not None and both else teacher.results[number])
        are_scores.append(both)
    inner = _inner_keys(student, teacher, inputs[0]) if plan.inner_weight else []
    examples = _examples(teacher, inputs[:_EXAMPLES], [*teacher_keys, *(its for _, its in inner)])
    count = len(teacher_keys)
    return Material(
        inputs=inputs,
        held=held,
        student_keys=[*student_keys, *(own for own, _ in inner)],
        teacher_keys=[*teacher_keys, *(its for _, its in inner)],
        loss=Loss(
            outputs=[output_loss(e, are_scores=a) for e, a in zip(examples[:count], are_scores, strict=True)],
            inner=[relative_error(e) for e in examples[count:]],
            inner_weight=plan.inner_weight,
        ),
        augment=augment,
        is_batched=is_batched,
    )


def _examples(teacher: Mirror, calls: Sequence[Batch], keys: Sequence[Key]) -> list[Any]:
    with torch.no_grad():
        values = [teacher([_wide(x) for x in call], keys) for call in calls]
    return [torch.cat([value[i] for value in values]) for i in range(len(keys))]


def _wide(x: Any) -> Any:
    return x if x.is_floating_point() or x.dtype == torch.bool else x.to(torch.int64)


def _inner_keys(student: Mirror, teacher: Mirror, call: Batch) -> list[tuple[Key, Key]]:
    """Places where both networks hold the same thing: joins of residual branches, spread over the depth."""
    own, its = student.places(_JOINS), teacher.places(_JOINS)
    shared = [title for title in its if title in own]
    with torch.no_grad():
        values = [_wide(x) for x in call]
        shapes = [tuple(x.shape) for x in student(values, [own[title] for title in shared])]
        wanted = [tuple(x.shape) for x in teacher(values, [its[title] for title in shared])]
    equal = [t for t, a, b in zip(shared, shapes, wanted, strict=True) if a == b and len(a) > 1]
    if len(equal) > _MOST_INNER:
        places = np.linspace(0, len(equal) - 1, _MOST_INNER).round().astype(int)
        equal = [equal[place] for place in places]
    return [(own[title], its[title]) for title in equal]


def _device() -> str:
    """Where PyTorch trains: on CUDA or an Intel GPU that it sees, else on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    xpu = getattr(torch, "xpu", None)
    return "xpu" if xpu is not None and xpu.is_available() else "cpu"


def _departure(reference: Predictions) -> Callable[[Predictions], float]:
    """How far a model's outputs on the held-back inputs are from the teacher's, measured as in training."""
    names = list(reference[0])
    expected = {name: [torch.tensor(call[name]) for call in reference] for name in names}
    losses = {name: output_loss(_stacked(values), are_scores=False) for name, values in expected.items()}

    def departure(outputs: Predictions) -> float:
        total = 0.0
        for name, wanted in expected.items():
            pairs = zip((torch.tensor(call[name]) for call in outputs), wanted, strict=True)
            total += sum(float(losses[name](own, its)) for own, its in pairs) / len(wanted)
        return total / len(names)

    return departure


def _stacked(calls: Sequence[Any]) -> Any:
    """Calls one behind the other; the first alone where their shapes differ."""
    return torch.cat(list(calls)) if len({tuple(call.shape) for call in calls}) == 1 else calls[0]


def seconds_per_step(student: ov.Model, teacher: ov.Model, data: Dataset, plan: DistillationPlan) -> float:
    """What one step takes here; raises what `train` raises before it starts."""
    inputs, held, _ = _parts(student, data, plan.seed)
    mirror, master = Mirror(student.clone()), Mirror(teacher.clone(), trains=False)
    check_equality(mirror, inputs[:_CHECKED])
    check_equality(master, inputs[:_CHECKED])
    material = _material(mirror, master, inputs, held[:_CHECKED], plan, Run())
    for each in (mirror, master):
        each.place(_device())
    settings = TrainingSettings(steps=_PACE_STEPS, batch=plan.batch, inner_weight=plan.inner_weight, seed=plan.seed)
    outcome = Training(student=mirror, teacher=master, material=material, settings=settings).run()
    return max(outcome.seconds / _PACE_STEPS, 1e-4)
