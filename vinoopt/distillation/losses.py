"""How far a student's outputs are from its teacher's: what is trained on, and what it is watched by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.compression.sensitivity import is_classifier_shape
from vinoopt.distillation.layouts import BOX, Detector, channel_axis

Measure: TypeAlias = Callable[[Any, Any], Any]
"""Student's and teacher's values of one output to a number."""
_TINY = 1e-12
_RULED_OUT = -1e4
"""As a score: what leaves nothing of a class."""
_QUIET = 0.1
_ERROR_SHARE = 0.1
"""Of the relative error beside the divergence of scores that no softmax follows: what their softmax does not see,
as a shift of all, may be seen by whoever reads them."""
_LEAST_CHANCE = 1e-3
"""Scores of a detector that count as none; nobody looks at boxes with less."""
_SURE = 0.9
"""Of the entropy of a mere guess: values whose softmax has more on average are no class scores."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OutputLoss:
    """The loss of one output, and what its reader would call equal."""

    distance: Measure
    """0 where both are equal."""
    agreement: Measure | None = None
    """Share of the decisions that are the same; None for an output that decides nothing."""

    def __call__(self, student: Any, teacher: Any) -> Any:
        """The distance."""
        return self.distance(student, teacher)


def output_loss(
    examples: Any,
    *,
    ending: str | None = None,
    class_axis: int = 1,
    is_finished: bool = True,
    open_axes: frozenset[int] = frozenset(),
    are_scores: bool = True,
    detector: Detector | None = None,
) -> OutputLoss:
    """The loss of an output, from the teacher's values on some inputs.

    `ending` names the `Softmax` or `Sigmoid` that makes the output, where one does, and `is_finished` says whether
    the values are those after it. Behind a softmax, and for class scores ([B, C], or that with trailing ones) that
    read as such: KL divergence of the softmax from the teacher's (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1). Behind a sigmoid: that of every yes or no. A softmax along `class_axis` of maps or sequences has
    the divergence of every place. The rows of a `detector`: see `detector_loss`. Anything else, as what is regressed
    or embedded: squared error over the teacher's variance, per channel. With `are_scores` false no output is taken
    for class scores by its values alone. Sizes along `open_axes` differ from call to call. What is not finite in the
    teacher, as the score of a class that is ruled out, counts nothing, and neither do whole numbers, which have no
    gradient.
    """
    if not examples.is_floating_point():
        return OutputLoss(distance=lambda student, teacher: torch.zeros(()))
    finite = torch.isfinite(examples)
    if not finite.all():
        loss = output_loss(
            torch.where(finite, examples, torch.zeros_like(examples)),
            ending=ending,
            class_axis=class_axis,
            is_finished=is_finished,
            open_axes=open_axes,
            are_scores=are_scores,
            detector=detector,
        )
        return replace(loss, distance=_where_finite(loss.distance))
    if ending == "Sigmoid" and is_row_shape(examples.shape):
        distance = _chances if is_finished else _chances_of_scores
        return OutputLoss(distance=distance, agreement=_same_sides(is_finished))
    error = relative_error(examples, open_axes=open_axes)
    if not is_classifier_shape(examples.shape):
        if ending != "Softmax" or examples.ndim < 3 or examples.shape[class_axis] < 2:
            return OutputLoss(distance=error if detector is None else detector_loss(detector, examples))
        distance = _of_shares if is_finished else _divergence
        return OutputLoss(distance=_by_rows(distance, class_axis), agreement=_by_rows(_same_classes, class_axis))
    if ending == "Softmax":
        return OutputLoss(distance=_of_shares if is_finished else _divergence, agreement=_same_classes)
    if _are_shares(examples):
        return OutputLoss(distance=_of_shares, agreement=_same_classes)
    if not are_scores or not _read_as_scores(examples):
        return OutputLoss(distance=error)
    return OutputLoss(distance=lambda s, t: _divergence(s, t) + _ERROR_SHARE * error(s, t), agreement=_same_classes)


def _where_finite(distance: Measure) -> Measure:
    """The distance over what is finite in the teacher."""

    def loss(student: Any, teacher: Any) -> Any:
        finite = torch.isfinite(teacher)
        return distance(*(torch.where(finite, x, torch.full_like(x, _RULED_OUT)) for x in (student, teacher)))

    return loss


def _by_rows(measure: Measure, axis: int) -> Measure:
    """The measure over [places, classes], from values with their classes along an axis."""
    return lambda student, teacher: measure(*(x.movedim(axis, -1).flatten(0, -2) for x in (student, teacher)))


def stacked(values: Sequence[Any]) -> tuple[Any, frozenset[int]]:
    """Values of several calls one behind the other, and the axes along which their sizes differ: cut to the least."""
    if not values[0].ndim:
        return torch.stack(list(values)), frozenset()
    sizes = [{value.shape[axis] for value in values} for axis in range(1, values[0].ndim)]
    least = (slice(None), *(slice(min(each)) for each in sizes))
    parts = [value[least] for value in values]
    return torch.cat(parts), frozenset(axis for axis, each in enumerate(sizes, start=1) if len(each) > 1)


def is_row_shape(shape: Sequence[int]) -> bool:
    """Whether an output of this shape has one row of values per sample: [B, C], or that with trailing ones."""
    return len(shape) >= 2 and all(size == 1 for size in shape[2:])


def _are_shares(values: Any) -> bool:
    """Whether the values of every sample sum to one, as a softmax makes them."""
    sums = values.flatten(1).sum(1)
    return float(values.min()) >= 0 and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-2))


def _read_as_scores(examples: Any) -> bool:
    """Whether their softmax decides: for one class here and another there, and more surely than by a guess."""
    scores = examples.flatten(1)
    logarithms = F.log_softmax(scores, -1)
    entropy = float(-(logarithms.exp() * logarithms).sum(1).mean())
    return entropy < _SURE * math.log(scores.shape[1]) and len(scores.argmax(1).unique()) > 1


# --------------------------------------------------------------------------- distances


def _divergence(student: Any, teacher: Any) -> Any:
    s, t = (F.log_softmax(x.flatten(1), -1) for x in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _of_shares(student: Any, teacher: Any) -> Any:
    s, t = (torch.log(x.flatten(1).clamp(min=_TINY)) for x in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _chances_of_scores(student: Any, teacher: Any) -> Any:
    yes, no = ((F.logsigmoid(sign * student), F.logsigmoid(sign * teacher)) for sign in (1, -1))
    return _bernoulli(*yes, *no).flatten(1).sum(1).mean()


def _chances(student: Any, teacher: Any) -> Any:
    return _bernoulli_of(student, teacher).flatten(1).sum(1).mean()


def _bernoulli_of(student: Any, teacher: Any) -> Any:
    """KL divergence of every chance from the teacher's."""
    yes, no = (
        (torch.log(s.clamp(min=_TINY)), torch.log(t.clamp(min=_TINY)))
        for s, t in ((student, teacher), (1 - student, 1 - teacher))
    )
    return _bernoulli(*yes, *no)


def _bernoulli(yes: Any, its_yes: Any, no: Any, its_no: Any) -> Any:
    """KL divergence of chances from the teacher's, given as logarithms."""
    return its_yes.exp() * (its_yes - yes) + its_no.exp() * (its_no - no)


def relative_error(examples: Any, *, open_axes: frozenset[int] = frozenset()) -> Measure:
    """Mean over channels of squared error over the variance of `examples`.

    Channels are the shortest dimension behind the batch of those that are no `open_axes`, as in damage tables of the
    search. One that hardly moves in the examples, as the score of a class that none of them shows, counts as one that
    moves by `_QUIET` of the usual: else it would outweigh all others.
    """
    channel = channel_axis(examples, open_axes)
    others = tuple(axis for axis in range(examples.ndim) if axis != channel)
    variance = examples.var(others, unbiased=False, keepdim=True) if others else examples.var(unbiased=False)
    floor = max(float(variance.median()) * _QUIET, float(variance.mean()) * 1e-6, _TINY)
    weight = 1 / variance.clamp(min=floor)

    def loss(student: Any, teacher: Any) -> Any:
        return ((student - teacher).square() * weight.to(student.device)).mean()

    return loss


def detector_loss(layout: Detector, examples: Any) -> Measure:
    """What is read of a detector's rows.

    Nearly all places of a detector show nothing, and nobody reads what it says of boxes and classes there: 96% of the
    relative error of YOLOX-Nano in INT8. So boxes count as much as the teacher is sure of an object there
    (objectness-scaled distillation: Mehta & Ozturk 2018, arXiv 1805.06361), and scores as they are read: times the
    objectness, where there is one. The loss is the KL divergence of the scores as chances, divided by the sum of the
    teacher's, and the squared error of the boxes, over their variance where `examples` are sure.
    """

    def parts(values: Any) -> tuple[Any, Any]:
        rows = values.float().movedim(layout.channel, -1).flatten(0, -2)
        scores = rows[:, BOX : layout.end]
        if layout.has_objectness:
            scores = scores[:, :1] * scores[:, 1:]
        return torch.cat([rows[:, :BOX], rows[:, layout.end :]], 1), scores.clamp(_LEAST_CHANCE, 1 - _LEAST_CHANCE)

    boxes, scores = parts(examples)
    sure = scores.amax(1, keepdim=True)
    usual, mass = float(sure.mean()), float(scores.sum(1).mean())
    share = sure / sure.sum()
    variance = (share * (boxes - (share * boxes).sum(0)).square()).sum(0)
    everywhere = boxes.var(0, unbiased=False)
    # What is the same at all objects must not outweigh the rest, and what is so everywhere says nothing.
    weight = 1 / torch.maximum(variance, _QUIET * everywhere).clamp(min=_TINY)
    weight = torch.where(everywhere > 1e-6 * everywhere.mean(), weight, torch.zeros(()))

    def loss(student: Any, teacher: Any) -> Any:
        (own, chances), (its, wanted) = parts(student), parts(teacher)
        apart = _bernoulli_of(chances, wanted).sum(1).mean() / mass
        error = (own - its).square() * weight.to(own.device)
        return apart + (wanted.amax(1, keepdim=True) * error).mean() / usual

    return loss


# --------------------------------------------------------------------------- decisions


def _same_classes(student: Any, teacher: Any) -> float:
    """Share of samples with the same highest score."""
    return float((student.flatten(1).argmax(1) == teacher.flatten(1).argmax(1)).float().mean())


def _same_sides(is_finished: bool) -> Measure:
    """Share of yes and no that are the same."""
    middle = 0.5 if is_finished else 0.0
    return lambda student, teacher: float(((student > middle) == (teacher > middle)).float().mean())


# --------------------------------------------------------------------------- all outputs


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loss:
    """The loss over all outputs, and over the values inside that are matched beside them."""

    outputs: Sequence[OutputLoss]
    inner: Sequence[Measure]

    def __call__(self, student: Sequence[Any], teacher: Sequence[Any], *, inner_weight: float) -> Any:
        """What is trained on; values are outputs first, then inner ones."""
        count = len(self.outputs)
        outer = self.of_outputs(student[:count], teacher[:count])
        if not self.inner or not inner_weight:
            return outer
        return outer + inner_weight * _mean(self.inner, student[count:], teacher[count:])

    def of_outputs(self, student: Sequence[Any], teacher: Sequence[Any]) -> Any:
        """The part that is of the outputs."""
        return _mean(self.outputs, student, teacher)

    def agreement(self, student: Sequence[Any], teacher: Sequence[Any]) -> float | None:
        """Mean share of equal decisions; None where no output decides anything."""
        triples = zip(self.outputs, student, teacher, strict=True)
        shares = [loss.agreement(s, t) for loss, s, t in triples if loss.agreement is not None]
        return float(sum(shares) / len(shares)) if shares else None


def _mean(losses: Sequence[Measure], student: Sequence[Any], teacher: Sequence[Any]) -> Any:
    values = [loss(s, t) for loss, s, t in zip(losses, student, teacher, strict=True)]
    return sum(values) / len(values)


def cross_entropy(scores: Any, labels: Any) -> Any:
    """Of class scores [B, C] with class numbers [B]; probabilities are told by their sum."""
    flat = scores.flatten(1)
    logarithms = torch.log(flat.clamp(min=_TINY)) if _are_shares(flat.detach()) else F.log_softmax(flat, -1)
    return F.nll_loss(logarithms, labels.reshape(-1).to(flat.device))
