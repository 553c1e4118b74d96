"""How far a model's outputs are from its teacher's in OpenVINO, and whether they came nearer for certain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from scipy import stats

from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.distillation.losses import Loss, OutputLoss, output_loss, stacked
from vinoopt.distillation.rules import failing
from vinoopt.distillation.school import School

_LEAST_DISTANCE, _TINY = 0.01, 1e-12
"""What is added to distances before their logarithms are taken: a share of their mean, or so much at least."""
_WORTHWHILE = 0.2
"""Share of the distance that must be gone: what is nearer by less may decide worse on other inputs. (MobileNetV2 in
INT8, 9% nearer after 117 steps on 27 held-back images, with the same decisions: 4 of 271 others lost.)"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Standing:
    """How far a model's outputs are from the teacher's, call by call."""

    distances: np.ndarray[Any, Any]
    """[calls]: the loss of training between the model's outputs and the teacher's."""
    agreements: np.ndarray[Any, Any] | None
    """[calls]: share of decisions that are the teacher's; None where outputs are no decisions."""

    @property
    def distance(self) -> float:
        """The mean."""
        return float(self.distances.mean())

    @property
    def agreement(self) -> float | None:
        """The mean."""
        return None if self.agreements is None else float(self.agreements.mean())

    def doubt_over(self, before: Standing) -> str:
        """Why this is not nearer than `before` by more than chance; empty where it is.

        The mean distance must fall by more than its standard error, and by a fifth. Or it must fall, and the mean of
        its logarithms by as much and more than theirs: of a few inputs, one that is far away may hold most of the
        mean, and most of its error.
        """
        gain, error = _mean_and_error(before.distances - self.distances)
        own, its = (np.maximum(each.distances, 0.0) for each in (self, before))
        least = max(_LEAST_DISTANCE * float(its.mean()), _TINY)
        usual_gain, usual_error = _mean_and_error(np.log((its + least) / (own + least)))
        if not (gain > error or (gain > 0 and usual_gain > usual_error)):
            return f"that is no more than chance (standard error {error:.2g})"
        usual_share = 1 - math.exp(-usual_gain) if usual_gain > usual_error else 0.0
        share = max(gain / max(before.distance, _TINY), usual_share)
        if share < _WORTHWHILE:
            return f"that is {share:.0%} nearer, and less than {_WORTHWHILE:.0%} is not worth other weights"
        if self.agreements is None or before.agreements is None:
            return ""
        loss, error = _mean_and_error(before.agreements - self.agreements)
        if loss > error:
            return f"{loss:.1%} fewer decisions are the float model's (standard error {error:.1%})"
        return ""

    def words_after(self, before: Standing) -> str:
        """Both in words."""
        count = len(self.distances)
        text = f"divergence from the float model on {count} held-back inputs {before.distance:.4g} before, "
        text += f"{self.distance:.4g} after"
        if self.agreement is None or before.agreement is None:
            return text
        return f"{text}; agreement {before.agreement:.1%} and {self.agreement:.1%}"


def _mean_and_error(differences: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Of paired differences: their mean, and its standard error; of a few (Student's t) so much more as makes it as
    sure."""
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return float(differences.mean()), error * float(stats.t.ppf(stats.norm.cdf(1), count - 1))


def _tensors(predictions: Predictions) -> list[list[Any]]:
    """Outputs in their order, call by call; half precision has no room for what losses compute."""
    values = [[torch.tensor(v) for v in call.values()] for call in predictions]
    return [[v.float() if v.is_floating_point() else v for v in call] for call in values]


class Departure:
    """Compares a model's outputs on the inputs kept for judgement with the teacher's, by the losses of training."""

    def __init__(self, school: School) -> None:
        self.data = school.judged
        endings = school.mirror.endings
        self.wanted = _tensors(school.reference)
        columns = [[call[place] for call in self.wanted] for place in range(len(endings))]
        outputs: list[OutputLoss] = []
        parts = zip(school.examples, columns, endings, school.detectors, strict=True)
        for (examples, axes), values, ending, detector in parts:
            open_axes = axes | stacked(values)[1]
            outputs.append(
                output_loss(
                    examples,
                    ending=None if ending is None else ending.kind,
                    class_axis=1 if ending is None else ending.axis,
                    open_axes=open_axes,
                    are_scores=school.are_scores,
                    detector=detector,
                )
            )
        self.loss = Loss(outputs=outputs, inner=[])

    def of(self, model: ov.Model) -> Standing:
        """The standing of a model as it is deployed."""
        with failing("running the model in OpenVINO"):
            outputs = _tensors(predict(model, self.data))
        pairs = list(zip(outputs, self.wanted, strict=True))
        shares = [self.loss.agreement(own, its) for own, its in pairs]
        known = np.array([math.nan if share is None else float(share) for share in shares])
        return Standing(
            distances=np.array([float(self.loss.of_outputs(own, its)) for own, its in pairs]),
            agreements=None if np.isnan(known).any() else known,
        )
