"""How sure: a 95% interval of how much faster, from paired rounds, and of each figure by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vinoopt.errors import InputError
from vinoopt.records import Comparison, Evidence, Measurement, Range

TRIM = 0.2
CONFIDENCE = 0.95
LEAST_ROUNDS = 5
INSTANCE_SPREAD = 0.01
"""Two compilations of one model differ for good, by where their memory lies: usually by less than this share, on a
machine whose caches others use by up to three times as much. No number of rounds averages that away. Where each
contestant was compiled several times, what was seen between its compilations is taken instead."""
SAME = 0.005
"""A difference of no more than this share is none that anybody would act on."""
MAX_CORRELATION = 0.9
RESAMPLES = 400
_BINS = 2000
"""Latencies are told apart this finely, in steps of equal share."""


class Interval(NamedTuple):
    """A centre and the ends of its 95% interval."""

    centre: float
    low: float
    high: float


def paired_interval(differences: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Centre of the rounds' differences with its 95% interval.

    20%-trimmed mean with Student's t on the winsorized variance (Tukey and McLaughlin 1963), so that rounds
    which something else disturbed neither move nor widen it. Neighbouring rounds resemble each other on a
    busy machine: the variance grows by `(1 + r) / (1 - r)` and the degrees of freedom shrink alike, where `r`
    is the lag-1 autocorrelation, freed of its small-sample bias (Marriott and Pope 1954) and never negative.
    Raises `InputError` for fewer than 5 rounds.
    """
    values = np.asarray(differences, np.float64)
    n, cut = len(values), int(TRIM * len(values))
    if n < LEAST_ROUNDS:
        raise InputError(f"{n} rounds are too few to compare; measure at least {LEAST_ROUNDS}")
    centre, error = _trimmed(values)
    inflation = _inflation(_winsorized(values))
    error *= math.sqrt(inflation)
    freedom = max((n - 2 * cut) / inflation - 1, 2.0)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(centre, centre - half, centre + half)


def compare(reference: Measurement, candidate: Measurement) -> Comparison:
    """How many times faster `candidate` is, with a 95% interval, from the rounds they ran side by side.

    Its variance is that of the rounds, and that between the compilations that each contestant had. The difference
    is significant where the whole interval is further than `SAME` from 1. Rounds are paired by their position, so
    both measurements must come out of one `measure` call. Raises `InputError` where they cannot be paired.
    """
    pair = f'"{reference.name}" and "{candidate.name}"'
    if len(reference.rounds_ms) != len(candidate.rounds_ms):
        raise InputError(
            f"{pair} have {len(reference.rounds_ms)} and {len(candidate.rounds_ms)} rounds: "
            "compare what one run measured side by side"
        )
    if reference.evidence is not candidate.evidence:
        raise InputError(f"{pair} rest on different evidence: {reference.evidence}, {candidate.evidence}")
    logs = np.log(np.asarray(reference.rounds_ms)) - np.log(np.asarray(candidate.rounds_ms))
    centre, low, high = paired_interval(logs)
    half = math.hypot(high - centre, _half_of_instances([reference, candidate], logs))
    low, high = centre - half, centre + half
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        speedup=math.exp(centre),
        low=math.exp(low),
        high=math.exp(high),
        is_significant=low > math.log1p(SAME) or high < -math.log1p(SAME),
        evidence=Evidence(reference.evidence),
    )


def _half_of_instances(contestants: Sequence[Measurement], logs: NDArray[np.float64]) -> float:
    """Half of the 95% interval that is due to which compilations the contestants happened to have.

    Student's t on the variances of their compilations' means, with Welch's degrees of freedom (Satterthwaite 1946).
    """
    parts = [_variance_of_instances(each, logs) for each in contestants]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    lost = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / lost if lost else math.inf
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)


def _variance_of_instances(measurement: Measurement, logs: NDArray[np.float64]) -> tuple[float, float]:
    """Of a contestant's mean, with its degrees of freedom; assumed where it was compiled once."""
    ran = np.asarray(measurement.instances)
    known = np.unique(ran)
    if len(known) < 2:
        return (math.log1p(INSTANCE_SPREAD) / float(stats.norm.ppf((1 + CONFIDENCE) / 2))) ** 2, math.inf
    groups = [logs[ran == each] for each in known]
    means, errors = zip(*(_trimmed(group) for group in groups), strict=True)
    # What rounds scatter by is in the means as well, and counted already.
    between = max(float(np.var(means, ddof=1)) - float(np.mean(np.square(errors))), 0.0)
    return between / len(means), len(means) - 1


def _trimmed(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 20%-trimmed mean and its standard error, as if the values were independent."""
    ordered, cut = np.sort(values), int(TRIM * len(values))
    if len(values) < 2:
        return float(ordered.mean()), 0.0
    error = float(_winsorized(values).std(ddof=1)) / ((1 - 2 * cut / len(values)) * math.sqrt(len(values)))
    return float(ordered[cut : len(values) - cut].mean()), error


def _winsorized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values, in their order, what is trimmed moved to the nearest that is not."""
    ordered, cut = np.sort(values), int(TRIM * len(values))
    return np.clip(values, ordered[cut], ordered[len(values) - cut - 1])


def percentile_ranges(
    rounds: Sequence[NDArray[np.float64]], percentiles: Sequence[float], *, seed: int = 0
) -> tuple[Range, ...]:
    """The 95% interval of each percentile of all values, by resampling rounds.

    Whole rounds are drawn, in blocks of neighbours (circular block bootstrap, Politis and Romano 1992): inferences of
    a round share its moment, and rounds that of those beside them.
    """
    values = np.concatenate(rounds)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, min(_BINS, len(values))), method="nearest"))
    places = (np.minimum(np.searchsorted(edges, each), len(edges) - 1) for each in rounds)
    counts = np.stack([np.bincount(each, minlength=len(edges)).astype(np.float64) for each in places])
    below = np.cumsum(_drawn(len(rounds), seed) @ counts, axis=1)
    found = []
    for percentile in percentiles:
        wanted = below[:, -1:] * (percentile / 100)
        reached = np.minimum((below < wanted).sum(axis=1), len(edges) - 1)
        found.append(_range(edges[reached], float(np.percentile(values, percentile))))
    return tuple(found)


def median_range(rounds_ms: Sequence[float], *, seed: int = 0) -> Range:
    """The 95% interval of the median of the rounds' figures, by resampling as in `percentile_ranges`."""
    return percentile_ranges([np.array([each]) for each in rounds_ms], (50,), seed=seed)[0]


def _drawn(rounds: int, seed: int) -> NDArray[np.float64]:
    """How often each round comes in each resample."""
    block = max(round(rounds ** (1 / 3)), 1)
    starts = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, -(-rounds // block)))
    chosen = ((starts[:, :, None] + np.arange(block)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]
    return np.stack([np.bincount(each, minlength=rounds).astype(np.float64) for each in chosen])


def _range(resampled: NDArray[np.float64], point: float) -> Range:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return Range(low=min(float(low), point), high=max(float(high), point))


def _inflation(values: NDArray[np.float64]) -> float:
    """How many times larger the variance of the mean is than for independent rounds; at least 1."""
    centred = values - values.mean()
    power = float(centred @ centred)
    if power == 0:
        return 1.0
    raw = float(centred[1:] @ centred[:-1]) / power
    r = min(max(raw + (1 + 3 * raw) / len(values), 0.0), MAX_CORRELATION)
    return (1 + r) / (1 - r)
