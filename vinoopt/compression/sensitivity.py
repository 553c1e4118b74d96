"""How much the model's outputs suffer from one choice alone: the damage table of the search.

Label-free: the divergence of a candidate's outputs from the float model's on a few held-back samples.
Nothing here knows names of heads or tails: a layer whose range is wide, or whose output feeds a box decoder or
a softmax, shows it in the outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

Array = npt.NDArray[np.float64]
Value = npt.NDArray[np.generic]
Values = Sequence[Value]
"""Of one output, one array per call."""
Outputs = Mapping[str, Value]

_EPSILON = 1e-12
_LEVELS = np.linspace(0.0, 1.0, 17)
"""Of the quantiles by which values in no known order are compared."""
_STRIDE = 4
"""Regions between two that are probed one after the other."""


def divergence(
    reference: Sequence[Outputs],
    candidate: Sequence[Outputs],
    *,
    are_scores: bool = True,
    open_outputs: Collection[str] = (),
) -> float:
    """Mean damage of the candidate's outputs, 0 for equal ones; both are one mapping per model call.

    A classifier's output ([B, C], or that with trailing dimensions of 1) is compared by the KL divergence of
    its softmax from the float model's, in nats. Any other output, and with `are_scores` false every one, by its
    mean squared error divided by the float model's variance, taken per channel, where the channels are the
    shortest dimension behind the batch: so the few class scores of a detector count as much as its large box
    coordinates. Of `open_outputs`, whose size hangs on what is found in an input, as that of boxes behind a
    suppression, the quantiles of every column are compared, and the number of rows: which rows are the same
    nobody knows. Outputs are averaged. Values that are not finite are infinite damage where the float model's are
    others.
    """
    damages = []
    for name in reference[0]:
        values = [call[name] for call in reference], [call[name] for call in candidate]
        if name in open_outputs or any(r.shape != c.shape for r, c in zip(*values, strict=True)):
            damages.append(_set_error(*values))
        else:
            damages.append(_output_divergence(*values, are_scores=are_scores))
    return float(np.mean(damages))


def _output_divergence(reference: Values, candidate: Values, *, are_scores: bool) -> float:
    pairs = [_finite_pair(r, c) for r, c in zip(reference, candidate, strict=True)]
    reference, candidate = [r for r, _ in pairs], [c for _, c in pairs]
    if not all(np.isfinite(values).all() for values in (*reference, *candidate)):
        return float("inf")
    is_regular = len({r.shape for r in reference}) == 1
    if are_scores and is_regular and is_classifier_shape(reference[0].shape):
        return _kl_divergence(_scores(reference), _scores(candidate))
    if not is_regular:  # each call on its own
        return float(np.mean([_relative_error([r], [c]) for r, c in pairs]))
    return _relative_error(reference, candidate)


def _finite_pair(reference: Value, candidate: Value) -> tuple[Value, Value]:
    """Both without what is not finite and the same in both, as a mask of minus infinity: 0 in either."""
    same = ~np.isfinite(reference)
    if not same.any():
        return reference, candidate
    same &= (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))
    return np.where(same, 0.0, reference), np.where(same, 0.0, candidate)


def is_classifier_shape(shape: Sequence[int]) -> bool:
    """Whether an output of this shape reads as class scores: [B, C] with C > 1, or [B, C, 1, ...]."""
    return len(shape) >= 2 and shape[1] > 1 and all(size == 1 for size in shape[2:])


def _scores(outputs: Values) -> Array:
    """Class scores of all calls as one [N, C] array."""
    return np.concatenate([np.asarray(o, np.float64).reshape(o.shape[0], o.shape[1]) for o in outputs])


def _kl_divergence(reference: Array, candidate: Array) -> float:
    """Mean KL divergence in nats; a softmax that the graph already holds is not applied twice."""
    if reference.min() >= 0 and np.allclose(reference.sum(axis=-1), 1, atol=1e-2):
        r, c = (np.log(np.maximum(scores, _EPSILON)) for scores in (reference, candidate))
    else:
        r, c = log_softmax(reference, axis=-1), log_softmax(candidate, axis=-1)
    return float(np.mean(np.sum(np.exp(r) * (r - c), axis=-1)))


def _relative_error(reference: Values, candidate: Values) -> float:
    """Mean over channels of squared error over variance, of calls of one shape whose first axis is the batch."""
    shape = reference[0].shape
    if not reference[0].size:
        return 0.0
    axis = min(range(1, len(shape)), key=lambda i: shape[i] if shape[i] > 1 else math.inf, default=None)

    def by_channel(values: Value) -> Array:
        wide = np.asarray(values, np.float64)
        return wide.reshape(1, -1) if axis is None else np.moveaxis(wide, axis, 0).reshape(shape[axis], -1)

    def mean(parts: Iterable[Array]) -> Array:
        """Of all calls, one at a time in float64: outputs may be large."""
        total: Array = sum((part.mean(axis=1) for part in parts), np.zeros(())) / len(reference)
        return total

    level = mean(map(by_channel, reference))[:, None]
    variance = mean((by_channel(r) - level) ** 2 for r in reference)
    error = mean((by_channel(r) - by_channel(c)) ** 2 for r, c in zip(reference, candidate, strict=True))
    return float(np.mean(error / np.maximum(variance, _floor(variance))))


def _floor(variance: Array) -> float:
    """A channel that never moves must not divide by zero."""
    return max(float(variance.mean()) * 1e-6, _EPSILON)


def _set_error(reference: Values, candidate: Values) -> float:
    """Mean over calls of the squared error of quantiles over variance, per column, and of the number of rows."""
    if any(np.isfinite(r).all() and not np.isfinite(c).all() for r, c in zip(reference, candidate, strict=True)):
        return float("inf")
    widths = {values.shape[-1] if values.ndim > 1 else 1 for values in (*reference, *candidate)}
    width = widths.pop() if len(widths) == 1 else 1

    def rows(values: Value) -> Array:
        table = np.asarray(values, np.float64).reshape(-1, width) if values.size else np.zeros((0, width))
        return table[np.isfinite(table).all(axis=1)]

    tables = [(rows(r), rows(c)) for r, c in zip(reference, candidate, strict=True)]
    known = np.concatenate([r for r, _ in tables])
    variance = known.var(axis=0) if len(known) else np.ones(width)
    scale = np.maximum(variance, _floor(variance))
    return float(np.mean([_table_error(r, c, scale) for r, c in tables]))


def _table_error(reference: Array, candidate: Array, scale: Array) -> float:
    """Of one call: 0 for the same rows in any order."""
    if not len(reference) or not len(candidate):
        return float(len(reference) != len(candidate))
    before, after = (np.quantile(rows, _LEVELS, axis=0) for rows in (reference, candidate))
    count = (len(candidate) - len(reference)) / len(reference)
    return float(np.mean((before - after) ** 2 / scale)) + count**2


@dataclass(frozen=True, kw_only=True, slots=True)
class DamageTable:
    """Damage per item alone, and what it took."""

    damages: Mapping[str, float]
    probes: int
    """Candidates that were run."""
    is_complete: bool
    """False where the time ran out: some damages are a region's, shared out evenly."""


def block_damages(
    blocks: Sequence[str],
    probe: Callable[[Sequence[str]], float],
    *,
    deadline: float | None = None,
    negligible: float = 0.02,
    progress: Callable[[int, int], None] | None = None,
) -> DamageTable:
    """Damage of each block in INT8 while all others stay float, by adaptive bisection.

    `probe(names)` is the damage with just `names` in INT8. Blocks are probed in contiguous regions; a region
    whose damage exceeds the share `negligible` of all regions together is halved, down to single blocks, the
    most damaging first: sensitive blocks are few, so most of the graph is settled by a handful of probes. A
    region that is not halved shares its damage evenly among its blocks. `deadline` is in `time.monotonic`
    seconds.
    """
    count = max(1, min(len(blocks), 2 * int(np.ceil(np.sqrt(len(blocks))))))
    regions = [list(part) for part in np.array_split(np.array(blocks, dtype=object), count) if len(part)]
    # Spread over the graph, so that where time is short not only its beginning is known.
    order = sorted(range(len(regions)), key=lambda place: (place % _STRIDE, place))
    settled = [(probe(regions[place]), regions[place]) for place in order]
    probes = len(settled)
    while True:
        total = sum(damage for damage, _ in settled if np.isfinite(damage)) + _EPSILON
        splittable = [
            (damage, region) for damage, region in settled if len(region) > 1 and damage > negligible * total
        ]
        if progress is not None:
            progress(probes, probes + 2 * len(splittable))
        if not splittable:
            return DamageTable(damages=_shared(settled), probes=probes, is_complete=True)
        if deadline is not None and time.monotonic() > deadline:
            return DamageTable(damages=_shared(settled), probes=probes, is_complete=False)
        worst = max(splittable, key=lambda entry: entry[0])
        settled.remove(worst)
        middle = len(worst[1]) // 2
        settled += [(probe(half), half) for half in (worst[1][:middle], worst[1][middle:])]
        probes += 2


def _shared(settled: Sequence[tuple[float, Sequence[str]]]) -> dict[str, float]:
    return {name: max(damage, 0.0) / len(region) for damage, region in settled for name in region}
