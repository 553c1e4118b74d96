"""`vinoopt.distill`: a compressed model, its float teacher and inputs without labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import openvino as ov
from pydantic import ValidationError

from vinoopt.accuracy.datasets import Dataset, from_arrays, load_dataset
from vinoopt.alarm import make_interrupts_safe
from vinoopt.distillation.needs import PRUNED_RATE, ROUNDED_RATE, require_torch, usual_batch
from vinoopt.errors import InputError
from vinoopt.frontend.normalize import load_model
from vinoopt.records import DistillationPlan, Event, PreprocessSpec, TensorSpec

if TYPE_CHECKING:
    from vinoopt.distillation.augment import Augment
    from vinoopt.distillation.distiller import Distilled

_WHOLE = 0.98
"""Of the teacher's constants, below which a model counts as pruned."""
Array: TypeAlias = "np.ndarray[Any, Any]"


@runtime_checkable
class HoldsModel(Protocol):
    """What `vinoopt.compress` returns, among others."""

    @property
    def model(self) -> ov.Model:
        """The compressed model."""
        ...


def distill(
    compressed: ov.Model | HoldsModel,
    *,
    teacher: ov.Model | HoldsModel | str | Path,
    data: Dataset | str | Path | Mapping[str, Array] | Array | Sequence[Any],
    labels: Any = None,
    label_weight: float = 0.3,
    steps: int = 2000,
    batch: int | None = None,
    peak_rate: float | None = None,
    inner_weight: float = 1.0,
    augment: bool | Augment = True,
    are_scores: bool = True,
    seed: int = 0,
    threads: int | None = None,
    time_limit_s: float | None = None,
    checkpoint: str | Path | None = None,
    preprocess: Sequence[PreprocessSpec] = (),
    shape: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Distilled:
    """`compressed` trained towards `teacher` on unlabelled inputs; never worse than it was.

    Both take the same inputs; a teacher given as an ONNX file is read with `preprocess` and `shape`, as `compile`
    reads it. `data` is a path or arrays in memory. Labels are looked at only where `labels` (class numbers, a path or
    a key, as in `compile`; True: those of a `Dataset`) are given: their cross entropy is added with `label_weight`.

    A step takes `batch` samples, by default 64, or 16 of what moves much, as photographs do. `peak_rate` is the
    largest change of a weight per step, relative to the size of the channel it makes; by default 0.01 for a model
    with fewer weights than its teacher, else 0.0001. With less than 600 steps, or time for no more, it is lowered by
    the root of their share, to half at most. Ranges of activations move by up to 0.001 of their size, scales of
    weights no faster than weights. Where the loss rises, all rates fall by half. `augment` mirrors, shifts and
    mixes images (True; one channel of floats is not taken for one), leaves inputs as they are (False), or is a
    function of the inputs of one batch and a `torch.Generator`. With `are_scores` false an output of class scores'
    shape ([B, C]) that no softmax follows is compared by its values: coordinates and embeddings, say, may read like
    scores. Of a detector's rows, boxes count where the teacher is sure of an object. A run that was interrupted, or
    cut by the time limit, goes on from `checkpoint`; Ctrl-C still raises `KeyboardInterrupt`. The result is the
    same in every run with `threads=1` and no time limit.

    `result.is_better` says whether training helped, by a fifth and by more than chance; `result.before` and
    `result.after` are divergences of the outputs from the teacher's on held-back inputs that training never saw,
    computed by OpenVINO.

    Raises `ExtraMissing` without PyTorch, `DistillationError` for an operator that has no rule or fails in PyTorch,
    for outputs without a gradient, and for inputs or outputs that are not the teacher's in its order, `DataError` for
    labels that are no classes of the first output, and what reading model and data raises.
    """
    require_torch()
    if threads is not None and threads < 1:
        raise InputError(f"threads: give 1 or more (got {threads})")
    make_interrupts_safe()
    from vinoopt.distillation.distiller import Run, train
    from vinoopt.distillation.school import open_school

    model = _named(_model(compressed))
    master = _named(_teacher(teacher, preprocess, shape))
    dataset = _dataset(data, labels, master, preprocess)
    say = on_event or (lambda event: None)
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    if checkpoint is not None:
        _make_room(Path(checkpoint))
    plan = _plan(
        runs=(steps,),
        batch=usual_batch(master, dataset) if batch is None else batch,
        peak_rate=_rate(model, master) if peak_rate is None else peak_rate,
        inner_weight=inner_weight,
        augments=bool(augment),
        label_weight=0.0 if labels is None else label_weight,
        are_scores=are_scores,
        seed=seed,
    )
    result = train(
        model,
        open_school(master, dataset, seed=seed, are_scores=are_scores),
        plan,
        Run(
            deadline=deadline,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            augment=None if isinstance(augment, bool) else augment,
            threads=threads,
            say=lambda message, done, total: say(Event(stage="distill", message=message, done=done, total=total)),
        ),
    )
    if checkpoint is not None and not result.outcome.is_cut:
        Path(checkpoint).unlink(missing_ok=True)
    return result


def _make_room(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        raise InputError(f"{checkpoint}: is a folder; name a file for the checkpoint, as {checkpoint / 'run.pt'}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)


def _model(given: ov.Model | HoldsModel) -> ov.Model:
    model = given.model if isinstance(given, HoldsModel) else given
    if not isinstance(model, ov.Model):
        raise InputError(
            f"a model is to be an ov.Model, or what vinoopt.compress returns, and is a {type(model).__name__}; "
            "read a compressed one's file with openvino.Core().read_model"
        )
    return model


def _named(model: ov.Model) -> ov.Model:
    """The model, with names for inputs that have none: they are fed by name."""
    if all(port.get_names() for port in model.inputs):
        return model
    model = model.clone()
    for port in model.inputs:
        if not port.get_names():
            port.set_names({port.get_node().get_friendly_name()})
    return model


def _teacher(
    given: ov.Model | HoldsModel | str | Path, preprocess: Sequence[PreprocessSpec], shape: str | None
) -> ov.Model:
    if isinstance(given, str | Path):
        return load_model(given, preprocess=preprocess, shape=shape).model
    return _model(given)


def _dataset(data: Any, labels: Any, model: ov.Model, preprocess: Sequence[PreprocessSpec]) -> Dataset:
    if isinstance(data, Dataset):
        if labels is None or labels is True:
            return data
        raise InputError("a Dataset carries its own labels: ask for them with labels=True, or give arrays or a path")
    if labels is True:
        raise InputError("labels=True asks for those of a Dataset; give class numbers, or a path or a key")
    inputs = [_spec(each) for each in model.inputs]
    if isinstance(data, str | Path):
        if labels is not None and not isinstance(labels, str | Path):
            raise InputError("labels in memory go with data in memory; give both as paths, or both as arrays")
        return load_dataset(
            str(data), inputs=inputs, labels=None if labels is None else str(labels), preprocess=preprocess
        )
    if isinstance(labels, str | Path):
        raise InputError("labels in a file go with data in files; give both as paths, or both as arrays")
    return from_arrays(data, inputs=inputs, labels=labels)


def _spec(given: ov.Output) -> TensorSpec:
    dimensions = [d.get_length() if d.is_static else "?" for d in given.get_partial_shape()]
    return TensorSpec(
        name=min(given.get_names()),
        shape=tuple(dimensions),
        dtype=np.dtype(given.get_element_type().to_dtype()).name,
    )


def _rate(model: ov.Model, teacher: ov.Model) -> float:
    own, its = (sum(_size(node) for node in each.get_ops()) for each in (model, teacher))
    return PRUNED_RATE if own < _WHOLE * its else ROUNDED_RATE


def _size(node: ov.Node) -> int:
    return int(np.prod(node.get_output_shape(0))) if node.get_type_name() == "Constant" else 0


def _plan(**fields: Any) -> DistillationPlan:
    try:
        return DistillationPlan(**fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join("steps" if part == "runs" else str(part) for part in first["loc"] if part != 0)
        raise InputError(f"{place}: {first['msg']} (got {first['input']!r:.80})") from exc


