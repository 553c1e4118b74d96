"""Whether a candidate may go on, from few samples: what its drop is expected to be on others.

With 200 samples and a budget of 1%, two images decide. A drop that was seen on so few is partly chance, and what
is known beside it pulls it towards the likely. A metric of hits changes only where a sample is gained or lost, and
small numerical damage changes samples near the decision boundary, where the float model is hardly more often
right than the other answer: of 230 such changes by INT8 and bf16 on seven models, 54% were losses. So the
share of losses among changes gets a beta prior, worth so many changes (conjugate updating, Gelman et al. 2013,
"Bayesian Data Analysis", section 2.4); heavy damage shows many changes and is not hidden by it. Nor is it by luck:
a search judges many candidates, and those that changed much and lost little were lucky, so that a drop below the
expected is believed the less the more has changed. Other metrics are
shrunk towards no drop as far as their interval cannot tell them from it (James and Stein 1961, positive part), but
not below a share of what was seen: an interval as wide as that of six samples says nothing for a candidate either.
"""

from __future__ import annotations

import numpy as np

from vinoopt.accuracy.evaluate import Scores
from vinoopt.accuracy.metrics import Metric
from vinoopt.records import Drop, DropType

LOSSES = 0.6
"""Share of losses among changed samples, as the prior has it: a little more than was seen, to be careful."""
CHANGES = 20.0
"""Changed samples that the prior is worth."""
LEAST_KEPT = 0.3
"""Of a drop that was seen, where the interval does not exclude that there is none."""
LEAST_KEPT_OF_CHANGES = 0.5
"""The same for metrics against the float model's own outputs, where every change is a loss."""
_SIGMAS = 2 * 1.96
"""Standard deviations from end to end of a 95% interval."""


def expected_drop(metric: Metric, reference: Scores, candidate: Scores, drop: Drop) -> float:
    """The drop to expect on other samples, in the units of `drop`, which was seen on these.

    With other metrics than hits, a candidate that improved by chance is expected to be as good as it was seen.
    """
    if not np.isfinite(drop.value):
        return drop.value
    if metric.is_mean and metric.higher_is_better:
        before = np.asarray(reference.statistics, np.float64)
        after = np.asarray(candidate.statistics, np.float64)
        if np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all() and not metric.needs_reference:
            return _of_hits(before, after) / (reference.value if drop.drop_type is DropType.RELATIVE else 1.0)
    if drop.value <= 0:
        return drop.value
    sigma = (drop.high - drop.low) / _SIGMAS
    least = LEAST_KEPT_OF_CHANGES if metric.needs_reference else LEAST_KEPT
    return drop.value * max(1.0 - (sigma / drop.value) ** 2, least)


def _of_hits(before: np.ndarray, after: np.ndarray) -> float:
    lost = float(np.sum(before * (1 - after)))
    won = float(np.sum((1 - before) * after))
    changed = lost + won
    share = (lost + LOSSES * CHANGES) / (changed + CHANGES)
    expected, seen = changed / len(before) * (2 * share - 1), (lost - won) / len(before)
    if seen >= expected:
        return float(expected)
    luck = min(changed / CHANGES, 1.0) * (expected - seen)
    return float(seen if luck < 0.5 / len(before) else seen + luck)  # half a sample is none
