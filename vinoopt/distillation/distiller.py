"""From a compressed `ov.Model` and its float teacher to a better one, or to the same one with the reason."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.distillation.augment import Augment, find_augment
from vinoopt.distillation.equality import check_batches, check_equality
from vinoopt.distillation.losses import Loss, OutputLoss, is_row_shape, output_loss, relative_error
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.rules import failing, wide
from vinoopt.distillation.training import Batch, Material, Outcome, Progress, Training, TrainingSettings
from vinoopt.distillation.weights import Key
from vinoopt.errors import DataError, DistillationError
from vinoopt.records import DistillationPlan

HELD_SHARE, MOST_HELD = 0.1, 384
"""Of the inputs, to be looked at only: a share, and at most so many calls. One half chooses the best state, the other
judges it, since what was chosen from looks better than it is."""
LEAST_HELD, MOST_SHARE = 32, 0.25
"""So many calls are looked at where that is no more than this share: with fewer the best state is found by chance."""
LEAST_INPUTS = 16
HELD_BYTES, INPUT_BYTES, EXAMPLE_BYTES = 512 << 20, 1 << 30, 256 << 20
"""Of the calls that are held back with their outputs; of inputs that are kept in memory, not read anew in every step;
of the values from which the spread of the teacher's is taken."""
STEP_BYTES = 2 << 30
"""Of the values inside the student in one pass: a step of more calls is taken in several."""
_CHECKED = 4
"""Calls on which a mirror has to equal OpenVINO."""
_EXAMPLES = 32
"""Calls on which the spread of the teacher's values is taken."""
_JOINS = frozenset({"Add"})
_MOST_INNER = 6
_PACE_STEPS = 10
_LATER_RATE = 0.4
"""Peak rate of a run, over that of the run before it, whose end it must not undo."""
_SIGNED_CALLS = 32
"""Of the inputs, in a checkpoint's signature."""
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
    """False: the model is the one that was handed in, since training did not make it better for certain."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What training takes here."""

    setup_s: float
    """Before and after the steps."""
    step_s: float


# --------------------------------------------------------------------------- what all students share


class _Calls(Sequence[Batch]):
    """Calls as tensors, in the order of the model's inputs; whole numbers in 8 bits stay, to save memory."""

    def __init__(self, data: Dataset, names: Sequence[str]) -> None:
        self.data = data
        self.names = names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = self.data[index]
        return [torch.from_numpy(np.ascontiguousarray(sample[name])) for name in self.names]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class School:
    """A teacher and its inputs, ready for any student."""

    teacher: ov.Model
    mirror: Mirror
    is_batched: bool
    """Whether the teacher's mirror takes several calls as one."""
    inputs: Sequence[Batch]
    """To learn from."""
    held: Sequence[Batch]
    """To choose the best state by."""
    judged: Dataset
    """To judge it by."""
    reference: Predictions
    """The teacher's outputs on them, computed in f32."""
    labels: Sequence[Any] | None
    """Class numbers of the inputs, where there are any."""
    digest: str
    """Of teacher and inputs."""


def open_school(teacher: ov.Model, data: Dataset, *, seed: int) -> School:
    """The teacher's mirror and the inputs in parts.

    Raises `DistillationError` for an operator without a rule, for a mirror that does not equal OpenVINO, for
    outputs without a gradient, and for too few inputs.
    """
    if len(data) < LEAST_INPUTS:
        raise DistillationError(f"{len(data)} inputs are too few to distil from; give at least {LEAST_INPUTS}")
    if not any(output.get_element_type().is_real() for output in teacher.outputs):
        raise DistillationError(
            "all outputs are whole numbers, which have no gradient; end the model before its ArgMax or TopK"
        )
    names = _names(teacher, data)
    order = np.random.default_rng(seed).permutation(len(data))
    count = _held_count(teacher, data)
    held, judged = data.subset(order[: count // 2]), data.subset(order[count // 2 : count])
    learn = data.subset(order[count:]).held(INPUT_BYTES)
    inputs = _Calls(learn, names)
    with failing("making the teacher's image in PyTorch"):
        mirror = Mirror(teacher.clone(), trains=False)
        check_equality(mirror, inputs[:_CHECKED])
    is_batched = check_batches(mirror, inputs[:3])
    mirror.place(_device())
    labels = learn.labels if isinstance(learn.labels, np.ndarray) else None
    return School(
        teacher=teacher,
        mirror=mirror,
        is_batched=is_batched,
        inputs=inputs,
        held=_Calls(held, names)[:],
        judged=judged,
        reference=predict(teacher, judged, properties={"INFERENCE_PRECISION_HINT": "f32"}),
        labels=None if labels is None else [torch.as_tensor(each, dtype=torch.int64).reshape(-1) for each in labels],
        digest=_digest(teacher, [*inputs[:_SIGNED_CALLS], [torch.tensor(len(data))]]),
    )


def _names(model: ov.Model, data: Dataset) -> list[str]:
    """The data's name of every input, in their order."""
    names = []
    for output in model.inputs:
        known = {*output.get_names(), output.get_node().get_friendly_name()}
        name = next((each for each in data[0] if each in known), None)
        if name is None:
            raise DistillationError(f"the data hold no input named {' or '.join(sorted(known))}")
        names.append(name)
    return names


def _held_count(teacher: ov.Model, data: Dataset) -> int:
    """How many calls are held back: enough to tell states apart, and no more than memory has room for."""
    least = min(LEAST_HELD, int(len(data) * MOST_SHARE))
    call = sum(array.nbytes for array in data[0].values()) + sum(map(_bytes, teacher.outputs))
    most = max(min(MOST_HELD, HELD_BYTES // max(call, 1)), 4)
    return min(max(int(len(data) * HELD_SHARE), least), most)


def _bytes(output: ov.Output) -> int:
    """Of one value in float32; 0 where its shape is open."""
    shape = output.get_partial_shape()
    return 4 * math.prod(shape.to_shape()) if shape.is_static else 0


def _digest(model: ov.Model, calls: Sequence[Batch] = ()) -> str:
    """Of a model's operators and constants, and of inputs."""
    content = hashlib.sha256()
    for node in model.get_ordered_ops():
        content.update(f"{node.get_type_name()} {node.get_attributes()}".encode())  # names may be new in every run
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() != "string":
            content.update(np.ascontiguousarray(node.get_data()).tobytes())
    for call in calls:
        for each in call:
            content.update(each.numpy().tobytes())
    return content.hexdigest()


# --------------------------------------------------------------------------- one student


def train(student: ov.Model, school: School, plan: DistillationPlan, run: Run) -> Distilled:
    """`student` after the last run of `plan`, trained towards the school's teacher.

    Never worse than it was: what counts is the divergence of the outputs on held-back inputs that had no part in
    training, computed by OpenVINO as deployed. It must fall by more than chance, and no decision may be further
    from the teacher's. Raises `DistillationError` as `open_school` does.
    """
    if plan.label_weight and school.labels is None:
        raise DataError("label_weight is about class numbers; give labels, one whole number per sample")
    ports = [(len(model.inputs), len(model.outputs)) for model in (student, school.teacher)]
    if ports[0] != ports[1]:
        raise DistillationError(f"the model has {ports[0]} inputs and outputs, and its teacher {ports[1]}")
    work = student.clone()
    with failing("making the model's image in PyTorch"):
        mirror = Mirror(work)
        check_equality(mirror, school.inputs[:_CHECKED])
        material = _material(mirror, school, plan, run)
    mirror.place(_device())
    departure = _Departure(school)
    before = departure.of(student)
    run.say(f"training on {len(school.inputs)} inputs, {len(school.judged)} kept for judgement", 0, plan.runs[-1])
    outcome = Training(
        student=mirror,
        teacher=school.mirror,
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
        signature=f"{plan.model_dump_json()} {_digest(student)} {school.digest}" if run.checkpoint else "",
        on_progress=lambda progress: run.say(progress_words(progress), progress.step, progress.steps),
    ).run()
    with failing("writing what was trained"):
        mirror.write()
        trained: ov.Model = work.clone()
    after = departure.of(trained)
    doubt = after.doubt_over(before)
    reason = f"{outcome.steps} of {plan.runs[-1]} steps ({outcome.reason}): {after.words_after(before)}"
    return Distilled(
        model=student.clone() if doubt else trained,
        plan=plan,
        before=before.distance,
        after=before.distance if doubt else after.distance,
        is_better=not doubt,
        reason=f"{reason}: kept as it was, since {doubt}" if doubt else reason,
        outcome=outcome,
    )


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
    shapes = [tuple(x.shape) for x in inputs[0]]
    augment = run.augment or (find_augment(shapes, mixes=not plan.label_weight) if plan.augments else None)
    pairs = list(_output_pairs(student, teacher))
    inner = _inner_keys(student, teacher, inputs[0]) if plan.inner_weight else []
    student_keys = [*(own for own, _, _ in pairs), *(own for own, _ in inner)]
    teacher_keys = [*(its for _, its, _ in pairs), *(its for _, its in inner)]
    examples = _examples(teacher, inputs[:_EXAMPLES], teacher_keys)
    count = len(pairs)
    return Material(
        inputs=inputs,
        held=school.held,
        student_keys=student_keys,
        teacher_keys=teacher_keys,
        loss=Loss(
            outputs=[
                output_loss(values, ending=ending, is_finished=ending is None)
                for values, (_, _, ending) in zip(examples[:count], pairs, strict=True)
            ],
            inner=[relative_error(values) for values in examples[count:]],
        ),
        augment=augment,
        together=_together(student, plan) if school.is_batched and check_batches(student, inputs[:3]) else 1,
        labels=school.labels if plan.label_weight else None,
        label_weight=plan.label_weight,
    )


def _output_pairs(student: Mirror, teacher: Mirror) -> Iterator[tuple[Key, Key, str | None]]:
    """What is compared per output, and the operator that would make scores of it: its inputs, where both have it."""
    outputs = student.model.outputs
    ends = zip(student.endings, teacher.endings, student.results, teacher.results, outputs, strict=True)
    for own, its, own_result, its_result, output in ends:
        is_same = own is not None and its is not None and own.kind == its.kind
        if is_same and own is not None and its is not None and (own.kind == "Softmax" or _is_row(output)):
            yield own.key, its.key, own.kind
        else:
            yield own_result, its_result, None


def _is_row(output: ov.Output) -> bool:
    shape = output.get_partial_shape()
    return shape.rank.is_static and is_row_shape([d.get_length() if d.is_static else 0 for d in shape])


def _together(student: Mirror, plan: DistillationPlan) -> int:
    """Calls of one pass: those of a step, or as many as memory has room for."""
    whole = max(plan.batch // (student.own_batch or 1), 1)
    call = sum(_bytes(output) for node in student.model.get_ops() for output in node.outputs())
    return max(min(whole, STEP_BYTES // max(call, 1)), 1)


def _examples(teacher: Mirror, calls: Sequence[Batch], keys: Sequence[Key]) -> list[Any]:
    """The teacher's values on some calls, as far as memory has room for them."""
    values: list[list[Any]] = []
    size = 0
    with torch.no_grad():
        for call in calls:
            values.append(teacher([wide(x) for x in call], keys))
            size += sum(4 * each.numel() for each in values[-1])
            if size > EXAMPLE_BYTES and len(values) > 1:
                break
    return [torch.cat([value[i] for value in values]) for i in range(len(keys))]


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


def _device() -> str:
    """Where PyTorch trains: on CUDA or an Intel GPU that it sees, else on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    xpu = getattr(torch, "xpu", None)
    return "xpu" if xpu is not None and xpu.is_available() else "cpu"


# --------------------------------------------------------------------------- judgement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Standing:
    """How far a model's outputs are from the teacher's, call by call."""

    distances: np.ndarray[Any, Any]
    agreement: float | None

    @property
    def distance(self) -> float:
        return float(self.distances.mean())

    def doubt_over(self, before: _Standing) -> str:
        """Why this is not surely nearer than `before`; empty where it is."""
        gains = before.distances - self.distances
        error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
        if not float(gains.mean()) > error:
            return f"that is no more than chance (standard error {error:.2g})"
        if self.agreement is not None and before.agreement is not None and self.agreement < before.agreement:
            return "fewer decisions are the float model's"
        return ""

    def words_after(self, before: _Standing) -> str:
        count = len(self.distances)
        text = f"divergence from the float model on {count} held-back inputs {before.distance:.4g} before, "
        text += f"{self.distance:.4g} after"
        if self.agreement is None or before.agreement is None:
            return text
        return f"{text}; agreement {before.agreement:.1%} and {self.agreement:.1%}"


class _Departure:
    """Compares a model's outputs on the inputs kept for judgement with the teacher's, by the losses of training."""

    def __init__(self, school: School) -> None:
        self.data = school.judged
        endings = [None if ending is None else ending.kind for ending in school.mirror.endings]
        self.wanted = [[torch.tensor(v) for v in call.values()] for call in school.reference]
        columns = [[call[place] for call in self.wanted] for place in range(len(endings))]
        outputs: list[OutputLoss] = [
            output_loss(_stacked(values), ending=ending) for values, ending in zip(columns, endings, strict=True)
        ]
        self.loss = Loss(outputs=outputs, inner=[])

    def of(self, model: ov.Model) -> _Standing:
        """The standing of a model as it is deployed."""
        with failing("running the model in OpenVINO"):
            outputs = [[torch.tensor(v) for v in call.values()] for call in predict(model, self.data)]
        pairs = list(zip(outputs, self.wanted, strict=True))
        shares = [self.loss.agreement(own, its) for own, its in pairs]
        known = [share for share in shares if share is not None]
        return _Standing(
            distances=np.array([float(self.loss.of_outputs(own, its)) for own, its in pairs]),
            agreement=sum(known) / len(known) if known else None,
        )


def _stacked(calls: Sequence[Any]) -> Any:
    """Calls one behind the other; the first alone where their shapes differ."""
    return torch.cat(list(calls)) if len({tuple(call.shape) for call in calls}) == 1 else calls[0]
