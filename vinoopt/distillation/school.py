"""What all students of a teacher share: its mirror, its outputs, and inputs in parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch

from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.compression.activations import sized_like
from vinoopt.distillation.equality import HALF_TOLERANCE, check_batches, check_equality, departure
from vinoopt.distillation.layouts import Detector, find_detector
from vinoopt.distillation.losses import stacked
from vinoopt.distillation.mirror import Mirror
from vinoopt.distillation.rules import failing, wide
from vinoopt.distillation.training import Batch
from vinoopt.distillation.weights import Key
from vinoopt.errors import DistillationError

HELD_SHARE, MOST_HELD = 0.1, 384
"""Of the inputs, to be looked at only: a share, and at most so many calls. One part chooses the best state, the other
judges it, since what was chosen from looks better than it is."""
_ENOUGH = 64
"""Calls looked at from which on one half of them judges; of fewer two thirds do: the last states of a run are alike,
and whether any is better than the first must be told."""
LEAST_HELD, MOST_SHARE = 32, 0.25
"""So many calls are looked at where that is no more than this share: with fewer the best state is found by chance."""
LEAST_INPUTS = 16
HELD_BYTES, INPUT_BYTES = 512 << 20, 1 << 30
"""Of the calls that are held back with their outputs; of inputs that stay in memory, not read anew in every step."""
CHECKED = 4
"""Calls on which a mirror has to equal OpenVINO."""
EXAMPLES, EXAMPLE_BYTES = 32, 256 << 20
"""Calls whose values tell what the teacher's outputs are, and how far they spread: so many, or of so many bytes."""
_SIGNED_CALLS = 32
"""Of the inputs, in a checkpoint's signature."""


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
        arrays = [sample[name] for name in self.names]
        return [torch.from_numpy(np.ascontiguousarray(x).reshape(x.shape)) for x in arrays]  # a scalar stays one


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
    device: str
    """Where PyTorch trains."""
    are_scores: bool
    """Whether outputs that look like class scores are taken for such."""
    examples: Sequence[tuple[Any, frozenset[int]]]
    """Per output the teacher's values on some inputs, and the axes along which sizes differ; see `stacked`."""
    detectors: Sequence[Detector | None]
    """Per output the layout of its rows, where they are a detector's."""


def check_can_teach(teacher: ov.Model, data: Dataset) -> None:
    """What can be said before any long work: raises the errors of `open_school` that one input shows."""
    _check(teacher, data)
    with failing("making the teacher's image in PyTorch"):
        mirror = Mirror(teacher.clone(), trains=False)
        check_equality(mirror, _Calls(data, _names(teacher, data))[:1])


def _check(teacher: ov.Model, data: Dataset) -> None:
    if len(data) < LEAST_INPUTS:
        given = f"{len(data)} inputs" if data.batch == 1 else f"{len(data)} calls of {data.batch} samples"
        raise DistillationError(f"{given} are too few to distil from; give at least {LEAST_INPUTS}")
    if not any(output.get_element_type().is_real() for output in teacher.outputs):
        raise DistillationError(
            "all outputs are whole numbers, which have no gradient; end the model before its ArgMax or TopK"
        )


def open_school(teacher: ov.Model, data: Dataset, *, seed: int, are_scores: bool = True) -> School:
    """The teacher's mirror and the inputs in parts; with `are_scores` false no output counts as class scores by its
    values alone.

    Raises `DistillationError` for an operator without a rule, for a mirror that does not equal OpenVINO, for
    outputs without a gradient, and for too few inputs.
    """
    _check(teacher, data)
    names = _names(teacher, data)
    order = np.random.default_rng(seed).permutation(len(data))
    count = _held_count(sized_like(teacher, _Calls(data, names)[0]), data)
    choosing = count // 2 if count >= _ENOUGH else max(count // 3, 2)
    held, judged = data.subset(order[:choosing]), data.subset(order[choosing:count])
    learn = data.subset(order[count:]).held(INPUT_BYTES)
    inputs, held_calls = _Calls(learn, names), _Calls(held, names)
    with failing("making the teacher's image in PyTorch"):
        mirror = Mirror(teacher.clone(), trains=False)
        check_equality(mirror, inputs[:CHECKED])
    is_batched = check_batches(mirror, inputs[:3])
    if is_batched and teacher.is_dynamic():
        is_batched = len({tuple(x.shape for x in call) for part in (inputs, held_calls) for call in part}) == 1
    with failing("running the teacher's image in PyTorch"):
        examples = examples_of(mirror, inputs[:EXAMPLES], mirror.results)
    results = mirror.model.get_results()
    detectors = [find_detector(result, *each) for result, each in zip(results, examples, strict=True)]
    where = _placed(mirror, inputs[0])
    is_numbered = isinstance(learn.labels, np.ndarray) and learn.labels.dtype.kind in "iu"
    known = learn.labels if is_numbered else None
    labels = None if known is None else [torch.as_tensor(each, dtype=torch.int64).reshape(-1) for each in known]
    return School(
        teacher=teacher,
        mirror=mirror,
        is_batched=is_batched,
        inputs=inputs,
        held=held_calls[:],
        judged=judged,
        reference=predict(teacher, judged, properties={"INFERENCE_PRECISION_HINT": "f32"}),
        labels=labels,
        digest=digest_of(teacher, [*inputs[:_SIGNED_CALLS], [torch.tensor(len(data))], labels or []]),
        device=where,
        are_scores=are_scores,
        examples=examples,
        detectors=detectors,
    )


def examples_of(teacher: Mirror, calls: Sequence[Batch], keys: Sequence[Key]) -> list[tuple[Any, frozenset[int]]]:
    """The teacher's values on some calls, as far as memory has room for them; see `stacked`."""
    values: list[list[Any]] = []
    size = 0
    with torch.no_grad():
        for call in calls:
            values.append([value.cpu() for value in teacher([wide(x) for x in call], keys)])
            size += sum(4 * each.numel() for each in values[-1])
            if size > EXAMPLE_BYTES and len(values) > 1:
                break
    return [stacked([value[i] for value in values]) for i in range(len(keys))]


def _placed(mirror: Mirror, call: Batch) -> str:
    """Where the mirror is now: on a device that computes what the CPU does, else on the CPU."""
    where = device()
    if where == "cpu":
        return where
    inputs = [wide(x) for x in call]
    with torch.no_grad():
        wanted = mirror(inputs, mirror.results)
        try:
            mirror.place(where)
            found = [value.cpu() for value in mirror(inputs, mirror.results)]
        except (DistillationError, RuntimeError):  # an operator that it lacks, or whose values lie in two places
            found = []
    apart = [departure(own.numpy(), its.numpy()) for own, its in zip(found, wanted, strict=False)]
    if found and max(apart, default=0.0) <= HALF_TOLERANCE:
        return where
    mirror.place("cpu")
    return "cpu"


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
    call = sum(array.nbytes for array in data[0].values()) + sum(map(bytes_of, teacher.outputs))
    most = max(min(MOST_HELD, HELD_BYTES // max(call, 1)), 4)
    return min(max(int(len(data) * HELD_SHARE), least), most)


def bytes_of(output: ov.Output) -> int:
    """Of one value in float32; 0 where its shape is open."""
    shape = output.get_partial_shape()
    return 4 * math.prod(shape.to_shape()) if shape.is_static else 0


def digest_of(model: ov.Model, calls: Sequence[Batch] = ()) -> str:
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


def device() -> str:
    """Where PyTorch trains: on CUDA or an Intel GPU that it sees, else on the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    xpu = getattr(torch, "xpu", None)
    return "xpu" if xpu is not None and xpu.is_available() else "cpu"
