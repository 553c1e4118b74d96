"""How far a student's outputs are from its teacher's: what is trained on, and what it is watched by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.compression.sensitivity import is_classifier_shape

OutputLoss: TypeAlias = Callable[[Any, Any], Any]
"""Student's and teacher's values of one output to a number, 0 where they are equal."""
_TINY = 1e-12
_QUIET = 0.1


def output_loss(examples: Any, *, are_scores: bool) -> OutputLoss:
    """The loss of an output, from the teacher's values on some inputs.

    Class scores ([B, C], or that with trailing ones): KL divergence of the softmax from the teacher's (Hinton et
    al. 2015, arXiv 1503.02531, at temperature 1). `are_scores` says that a softmax follows in the graph, so these
    are its inputs; without, values that already sum to one are taken as probabilities. Anything else: squared
    error over the teacher's variance, per channel.
    """
    if is_classifier_shape(examples.shape):
        sums = examples.flatten(1).sum(1)
        is_softmax = float(examples.min()) >= 0 and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-2))
        return _divergence_of_probabilities if is_softmax and not are_scores else _divergence
    if not examples.is_floating_point():
        return lambda student, teacher: torch.zeros(())
    return relative_error(examples)


def _divergence(student: Any, teacher: Any) -> Any:
    s, t = (F.log_softmax(x.flatten(1), -1) for x in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _divergence_of_probabilities(student: Any, teacher: Any) -> Any:
    s, t = (torch.log(x.flatten(1).clamp(min=_TINY)) for x in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def relative_error(examples: Any) -> OutputLoss:
    """Mean over channels of squared error over the variance of `examples`.

    Channels are the shortest dimension behind the batch, as in damage tables of the search. One that hardly moves
    in the examples, as the score of a class that none of them shows, counts as one that moves by `_QUIET` of the
    usual: else it would outweigh all others.
    """
    inner = range(1, examples.ndim)
    sizes = {axis: examples.shape[axis] for axis in inner if examples.shape[axis] > 1}
    channel = min(sizes, key=lambda axis: sizes[axis], default=0)
    others = tuple(axis for axis in range(examples.ndim) if axis != channel)
    variance = examples.var(others, unbiased=False, keepdim=True) if others else examples.var(unbiased=False)
    floor = max(float(variance.median()) * _QUIET, float(variance.mean()) * 1e-6, _TINY)
    weight = 1 / variance.clamp(min=floor)

    def loss(student: Any, teacher: Any) -> Any:
        return ((student - teacher).square() * weight.to(student.device)).mean()

    return loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loss:
    """The loss over all outputs, and over the values inside that are matched beside them."""

    outputs: Sequence[OutputLoss]
    inner: Sequence[OutputLoss]
    inner_weight: float

    def __call__(self, student: Sequence[Any], teacher: Sequence[Any]) -> tuple[Any, Any]:
        """What is trained on, and its part that is of the outputs; values are outputs first, then inner ones."""
        count = len(self.outputs)
        outer = self.of_outputs(student[:count], teacher[:count])
        if not self.inner or not self.inner_weight:
            return outer, outer
        return outer + self.inner_weight * _mean(self.inner, student[count:], teacher[count:]), outer

    def of_outputs(self, student: Sequence[Any], teacher: Sequence[Any]) -> Any:
        """The part that is of the outputs."""
        return _mean(self.outputs, student, teacher)


def _mean(losses: Sequence[OutputLoss], student: Sequence[Any], teacher: Sequence[Any]) -> Any:
    values = [loss(s, t) for loss, s, t in zip(losses, student, teacher, strict=True)]
    return sum(values) / len(values)


def cross_entropy(scores: Any, labels: Any) -> Any:
    """Of class scores [B, C] with class numbers [B]; probabilities are told by their sum."""
    flat = scores.flatten(1)
    sums = flat.detach().sum(1)
    is_softmax = float(flat.detach().min()) >= 0 and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-2))
    logarithms = torch.log(flat.clamp(min=_TINY)) if is_softmax else F.log_softmax(flat, -1)
    return F.nll_loss(logarithms, labels.reshape(-1).to(flat.device))


def agreement(student: Any, teacher: Any) -> float | None:
    """Share of samples with the same highest score; None for an output that is not class scores."""
    if not is_classifier_shape(teacher.shape):
        return None
    return float((student.flatten(1).argmax(1) == teacher.flatten(1).argmax(1)).float().mean())
