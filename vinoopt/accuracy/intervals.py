"""95% intervals for paired drops: score and exact ones for shares of hits, bootstraps for the rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Array = NDArray[Any]
Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 2000
_Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
_BCA_SAMPLES = 3000
"""Above it the jackknife of BCa costs more than its correction, of order 1/n, is worth."""
_CHUNK_CELLS = 4_000_000
"""Resampling counts held at once."""


def difference_interval(lost: float, won: float, samples: float) -> Interval:
    """Score interval of p(reference hits) - p(candidate hits), from discordant pairs of so many samples.

    `lost`: only the reference hits; `won`: only the candidate. It has a width even where no pair is discordant.
    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998) 891-908.
    """

    def score(delta: float) -> float:
        b = -lost - won + (2 * samples - lost + won) * delta
        c = -won * delta * (1 - delta)
        root = math.sqrt(max(b * b - 8 * samples * c, 0.0))
        # The root without cancellation: for b > 0 the textbook form subtracts two nearly equal numbers.
        other = (root - b) / (4 * samples) if b <= 0 else (-2 * c / (root + b) if root + b > 0 else 0.0)
        variance = samples * (2 * other + delta * (1 - delta))
        return _standardised(lost - won - samples * delta, variance)

    return _score_limits(score, (lost - won) / samples, low=-1.0, high=1.0)


def relative_interval(both: float, lost: float, won: float, samples: float) -> Interval:
    """Score interval of 1 - p(candidate hits) / p(reference hits), paired.

    Nam and Blackwelder, "Analysis of the ratio of marginal probabilities in a matched-pair setting",
    Statistics in Medicine 21 (2002) 689-699. The reference must hit at least once.
    """
    reference, candidate = (both + lost) / samples, (both + won) / samples
    only_won, only_lost, any_hit = won / samples, lost / samples, (both + lost + won) / samples

    def score(ratio: float) -> float:
        square = ratio * ratio
        inner = (candidate - square * reference) ** 2 + 4 * square * only_won * only_lost
        # Maximum likelihood under candidate = ratio * reference: the share that only the candidate hits.
        p_won = -candidate + square * (reference + 2 * only_won) + math.sqrt(inner)
        p_won /= 2 * ratio * (ratio + 1)
        p_lost = ratio * p_won - (ratio - 1) * any_hit
        return _standardised(candidate - ratio * reference, ratio * (p_won + p_lost) / samples)

    low, high = _score_limits(score, candidate / reference, low=1e-9, high=1e9)
    return 1 - high, 1 - low


def exact_interval(events: float, samples: float) -> Interval:
    """Exact interval of a share (Clopper and Pearson, Biometrika 26 (1934) 404-413)."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if events <= 0 else float(stats.beta.ppf(tail, events, samples - events + 1))
    high = 1.0 if events >= samples else float(stats.beta.ppf(1 - tail, events + 1, samples - events))
    return low, high


def _standardised(difference: float, variance: float) -> float:
    if variance > 1e-300:
        return difference / math.sqrt(variance)
    return 0.0 if difference == 0 else math.copysign(math.inf, difference)


def _score_limits(score: Callable[[float], float], centre: float, *, low: float, high: float) -> Interval:
    """Where the falling score crosses +z (left of the centre) and -z (right of it)."""
    bound = 1e6

    def crossing(target: float, left: float, right: float) -> float:
        def gap(value: float) -> float:
            return min(max(score(value), -bound), bound) - target

        if gap(left) * gap(right) > 0:
            return left if target > 0 else right
        return float(optimize.brentq(gap, left, right, xtol=1e-12))

    step = 1e-12 * max(1.0, abs(centre))
    left = low if centre <= low else crossing(_Z, low, max(centre - step, low))
    right = high if centre >= high else crossing(-_Z, min(centre + step, high), high)
    return left, right


def bootstrap_means(reference: Array, candidate: Array, *, relative: bool, seed: int) -> tuple[Interval, str]:
    """Interval of the mean of `reference - candidate`, or of its ratio to the reference's; and the method.

    BCa (Efron, "Better bootstrap confidence intervals", JASA 82 (1987) 171-185), the percentile interval for
    large samples.
    """
    data = (reference, candidate) if relative else (reference - candidate,)
    methods = ("BCa", "percentile") if len(reference) <= _BCA_SAMPLES else ("percentile",)
    for method in methods:
        with warnings.catch_warnings():
            # Where nearly all samples are equal BCa has no answer (NaN), and the percentile interval is taken.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                data,
                _relative_means if relative else np.mean,
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=max(1, _CHUNK_CELLS // (4 * len(reference))),
                confidence_level=LEVEL,
                method=method,
                rng=np.random.default_rng(seed),
            )
        low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
        if np.isfinite([low, high]).all():
            break
    return (low, high), f"bootstrap ({RESAMPLES}, {method})"


def _relative_means(reference: Array, candidate: Array, axis: int = -1) -> Array:
    base = np.mean(reference, axis=axis)
    drops: Array = (base - np.mean(candidate, axis=axis)) / np.abs(base)
    return drops


def bootstrap_counts(drops: Callable[[Array], Array], *, samples: int, seed: int) -> tuple[Interval, str]:
    """Percentile interval of what `drops` makes of resampling counts [R, samples]; and the method."""
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK_CELLS // max(samples, 1))
    drawn = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        picks = random.integers(0, samples, size=(size, samples)) + samples * np.arange(size)[:, None]
        counts = np.bincount(picks.reshape(-1), minlength=size * samples).reshape(size, samples)
        drawn.append(drops(counts))
    values = np.concatenate(drawn)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values[np.isfinite(values)], [tail, 1 - tail])
    return (float(low), float(high)), f"bootstrap ({RESAMPLES}, percentile)"
