"""From a compressed `ov.Model` and its float teacher to a better one, or to the same one with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from vinoopt.compression.activations import sized_like
from vinoopt.compression.sensitivity import is_classifier_shape
from vinoopt.distillation.augment import Augment, find_augment
from vinoopt.distillation.equality import check_batches, check_equality
from vinoopt.distillation.losses import Loss, is_row_shape, output_loss, relative_error
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.rules import failing, wide
from vinoopt.distillation.school import CHECKED, EXAMPLES, School, bytes_of, digest_of, examples_of
from vinoopt.distillation.standing import Departure
from vinoopt.distillation.training import (
    NOT_FINITE,
    Batch,
    Material,
    Outcome,
    Progress,
    Training,
    TrainingSettings,
    pace,
)
from vinoopt.distillation.weights import Key
from vinoopt.errors import DataError, DistillationError
from vinoopt.records import DistillationPlan

STEP_BYTES = 2 << 30
"""Of the values inside the student in one pass: a step of more calls is taken in several."""
_JOINS = frozenset({"Add"})
_MOST_INNER = 6
_PACE_STEPS = 10
_RANGE_RATE = 0.001
"""Peak rate of ranges, whose factors are logarithms, whatever that of weights is: those that were only rounded have
hardly to move, their scales and the ranges that calibration chose have. (YOLOX-Nano in INT8 by the mixed preset, 150
steps: divergence .0172 before, .0148 with two fifths of this, .0125 with twice as much.)"""
_LATER_RATE = 0.5
"""For every earlier run, whose end the next one must not undo."""
Say = Callable[[str, int, int], None]
"""A message, steps done and steps in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """A trained model, or the model as it was."""

    model: ov.Model
    plan: DistillationPlan
    before: float
    """Divergence from the teacher on held-back inputs that training never saw, as OpenVINO computes both."""
    after: float
    is_better: bool
    """False: the model is the one that was handed in, since training did not make it better by more than chance.
    Where others judge what comes out (`Run.is_judged_later`) it is not asked, and always True."""
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
    is_judged_later: bool = False
    """Whether the caller judges what comes out on other inputs, and keeps what went in: it is given what was trained,
    whatever the few held-back inputs say."""
    say: Say = lambda message, done, total: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What training takes here."""

    setup_s: float
    """Before and after the steps."""
    step_s: float


# --------------------------------------------------------------------------- one student


def train(student: ov.Model, school: School, plan: DistillationPlan, run: Run) -> Distilled:
    """`student` after the last run of `plan`, trained towards the school's teacher.

    Never further from the teacher than it was: what counts is the divergence of the outputs on held-back inputs that
    had no part in training, computed by OpenVINO as deployed. It must fall by a fifth, and by more than chance, that
    is, by one standard error (`Standing.doubt_over`), by which the share of the teacher's decisions must not fall.
    With `run.is_judged_later` none of this is asked for. Raises `DistillationError` as `open_school` does.
    """
    if plan.label_weight:
        _check_labels(school)
    _check_ports(student, school.teacher)
    with _threads(run.threads):
        return _trained(student, school, plan, run)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch with so many threads."""
    usual = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _trained(student: ov.Model, school: School, plan: DistillationPlan, run: Run) -> Distilled:
    work = student.clone()
    with failing("making the model's image in PyTorch"):
        mirror = Mirror(work)
        check_equality(mirror, school.inputs[:CHECKED])
        material = _material(mirror, school, plan, run)
    mirror.place(school.device)
    with failing("reading the float model's outputs"):
        departure = Departure(school)
    began = time.monotonic()
    before = departure.of(student)
    judging_s = 0.0 if run.is_judged_later else time.monotonic() - began
    run.say(f"training on {len(school.inputs)} inputs, {len(school.judged)} kept for judgement", 0, plan.runs[-1])
    outcome = Training(
        student=mirror,
        teacher=school.mirror,
        material=material,
        settings=TrainingSettings(
            steps=plan.runs[-1],
            batch=plan.batch,
            peak_rate=last_rate(plan),
            range_rate=_RANGE_RATE * _later(plan),
            inner_weight=plan.inner_weight,
            seed=plan.seed + len(plan.runs) - 1,
            may_keep_first=not run.is_judged_later,
        ),
        deadline=None if run.deadline is None else run.deadline - judging_s,
        checkpoint=run.checkpoint,
        signature=f"{plan.model_dump_json()} {digest_of(student)} {school.digest}" if run.checkpoint else "",
        on_progress=lambda progress: run.say(progress_words(progress), progress.step, progress.steps),
    ).run()
    is_lost = outcome.reason == NOT_FINITE and not outcome.best_step
    if is_lost and (outcome.steps == 1 or run.is_judged_later):
        advice = "check that the inputs and the float model's outputs on them are finite"
        if outcome.steps > 1:
            advice = "a lower peak rate may help"
        raise DistillationError(f"the loss was not finite in step {outcome.steps}: {advice}")
    with failing("writing what was trained"):
        mirror.write()
        trained: ov.Model = work.clone()
    after = departure.of(trained)
    doubt = "" if run.is_judged_later else after.doubt_over(before)
    if is_lost:
        doubt = "the loss was not finite in the last step, before any that made it better: a lower peak_rate may help"
    reason = f"{outcome.steps} of {plan.runs[-1]} steps ({outcome.reason}): {after.words_after(before)}"
    if outcome.unsaved:
        reason += f"; no checkpoint was written to {run.checkpoint} ({outcome.unsaved}): name another place"
    return Distilled(
        model=student.clone() if doubt else trained,
        plan=plan,
        before=before.distance,
        after=before.distance if doubt else after.distance,
        is_better=not doubt,
        reason=f"{reason}: kept as it was, since {doubt}" if doubt else reason,
        outcome=outcome,
    )


def _check_ports(student: ov.Model, teacher: ov.Model) -> None:
    """Raises `DistillationError` where inputs or outputs are not the teacher's, in its order."""
    ports = [(len(model.inputs), len(model.outputs)) for model in (student, teacher)]
    if ports[0] != ports[1]:
        raise DistillationError(f"the model has {ports[0]} inputs and outputs, and its teacher {ports[1]}")
    for kind, own, its in (("input", student.inputs, teacher.inputs), ("output", student.outputs, teacher.outputs)):
        for place, names in enumerate(port.get_names() for port in own):
            places = [n for n, port in enumerate(its) if names & port.get_names()]
            if places and place not in places:
                raise DistillationError(
                    f"{kind} '{min(names)}' is number {place} of the model and number {places[0]} of its teacher; "
                    f"give both their {kind}s in the same order"
                )


def _check_labels(school: School) -> None:
    """Raises `DataError` where there are no labels, or they are no class numbers of the first output."""
    if school.labels is None:
        raise DataError("label_weight is about class numbers; give labels, one whole number per sample")
    shape = next(iter(school.reference[0].values())).shape
    if not is_classifier_shape(shape):
        raise DataError(
            f"labels are learned by class scores, [B, C], and the first output is {list(shape)}; leave the labels out"
        )
    known = torch.cat(list(school.labels))
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= shape[1]:
        raise DataError(f"the labels go from {low} to {high}, and the first output has {shape[1]} classes")


def last_rate(plan: DistillationPlan) -> float:
    """The peak rate of the plan's last run."""
    rate: float = plan.peak_rate * pace(plan.runs[-1]) * _later(plan)
    return rate


def _later(plan: DistillationPlan) -> float:
    """What earlier runs leave of the rates of the last."""
    return float(_LATER_RATE ** (len(plan.runs) - 1))


def cost_of(student: ov.Model, school: School, plan: DistillationPlan) -> Cost:
    """What a run of the plan takes here, from a few of its steps; raises what `train` raises."""
    began = time.monotonic()
    outcome = train(student, school, plan.model_copy(update={"runs": (_PACE_STEPS,)}), Run()).outcome
    whole_s = time.monotonic() - began
    return Cost(setup_s=max(whole_s - outcome.steps * outcome.step_s, 0.0), step_s=outcome.step_s)


def progress_words(progress: Progress) -> str:
    """One line about where a run stands."""
    parts = [f"step {progress.step} of {progress.steps}"]
    if progress.step:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.looked_at or not progress.step:  # else the last look was at the beginning
        best = f"best {progress.best_loss:.4g}, first {progress.first_loss:.4g}"
        parts.append(f"held back {progress.held_loss:.4g} ({best})")
        if progress.agreement is not None:
            parts.append(f"agreement {progress.agreement:.1%}")
    if progress.step and progress.step < progress.steps:
        parts.append(f"{progress.seconds_left:.0f} s left")
    return ", ".join(parts)


# --------------------------------------------------------------------------- what is learned from


def _material(student: Mirror, school: School, plan: DistillationPlan, run: Run) -> Material:
    inputs, teacher = school.inputs, school.mirror
    augment = run.augment or (find_augment(inputs[0], mixes=not plan.label_weight) if plan.augments else None)
    pairs = list(_output_pairs(student, teacher))
    inner = _inner_keys(student, teacher, inputs[0]) if plan.inner_weight else []
    student_keys = [*(own for own, _, _ in pairs), *(own for own, _ in inner)]
    teacher_keys = [*(its for _, its, _ in pairs), *(its for _, its in inner)]
    count = len(pairs)
    examples = examples_of(teacher, inputs[:EXAMPLES], teacher_keys)
    # Masks hold what is not finite: nothing can be matched there.
    matched = [n for n, (values, _) in enumerate(examples) if n < count or bool(torch.isfinite(values).all())]
    is_batched = school.is_batched and check_batches(student, inputs[:3])
    return Material(
        inputs=inputs,
        held=school.held,
        student_keys=[student_keys[n] for n in matched],
        teacher_keys=[teacher_keys[n] for n in matched],
        loss=Loss(
            outputs=[
                output_loss(
                    values,
                    open_axes=axes,
                    is_finished=not ending,
                    are_scores=school.are_scores,
                    detector=detector,
                    **ending,
                )
                for (values, axes), (_, _, ending), detector in zip(
                    examples[:count], pairs, school.detectors, strict=True
                )
            ],
            inner=[relative_error(examples[n][0], open_axes=examples[n][1]) for n in matched[count:]],
        ),
        augment=augment,
        together=_together(student, plan, inputs[0]) if is_batched else 1,
        labels=school.labels if plan.label_weight else None,
        label_weight=plan.label_weight,
    )


def _output_pairs(student: Mirror, teacher: Mirror) -> Iterator[tuple[Key, Key, dict[str, Any]]]:
    """What is compared per output, and the operator that would make scores of it: its inputs, where both have it."""
    outputs = student.model.outputs
    ends = zip(student.endings, teacher.endings, student.results, teacher.results, outputs, strict=True)
    for own, its, own_result, its_result, output in ends:
        is_same = own is not None and its is not None and own.kind == its.kind
        if is_same and own is not None and its is not None and (own.kind == "Softmax" or _is_row(output)):
            yield own.key, its.key, {"ending": own.kind, "class_axis": own.axis}
        else:
            yield own_result, its_result, {}


def _is_row(output: ov.Output) -> bool:
    shape = output.get_partial_shape()
    return shape.rank.is_static and is_row_shape([d.get_length() if d.is_static else 0 for d in shape])


def _together(student: Mirror, plan: DistillationPlan, call: Batch) -> int:
    """Calls of one pass: those of a step, or as many as memory has room for."""
    own = student.own_batch or (call[0].shape[0] if call[0].ndim else 1) or 1
    whole = max(plan.batch // own, 1)
    model = sized_like(student.model, call)
    return max(min(whole, STEP_BYTES // max(_held_bytes(model), 1)), 1)


def _held_bytes(model: ov.Model) -> int:
    """Of all values that hang on the inputs."""
    live: set[str] = set()
    held = 0
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_name() for value in node.input_values()]
        if node.get_type_name() == "Parameter" or not live.isdisjoint(sources):
            live.add(node.get_name())
            held += sum(map(bytes_of, node.outputs()))
    return held


def _inner_keys(student: Mirror, teacher: Mirror, call: Batch) -> list[tuple[Key, Key]]:
    """Places where both networks hold the same thing: joins of residual branches, spread over the depth."""
    own, its = student.places(_JOINS), teacher.places(_JOINS)
    shared = [title for title in its if title in own]
    with torch.no_grad():
        values = [wide(x) for x in call]
        shapes = [tuple(x.shape) for x in student(values, [own[title] for title in shared])]
        wanted = [tuple(x.shape) for x in teacher(values, [its[title] for title in shared])]
    equal = [t for t, a, b in zip(shared, shapes, wanted, strict=True) if a == b and len(a) > 1]
    if len(equal) > _MOST_INNER:
        places = np.linspace(0, len(equal) - 1, _MOST_INNER).round().astype(int)
        equal = [equal[place] for place in places]
    return [(own[title], its[title]) for title in equal]
