"""How much the model's outputs suffer from one choice alone: the damage table of the search.

Label-free: the divergence of a candidate's outputs from the float model's on a few held-back samples.
Nothing here knows names of heads or tails: a layer whose range is wide, or whose output feeds a box decoder or
a softmax, shows it in the outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

Array = npt.NDArray[np.float64]
Outputs = Mapping[str, npt.NDArray[np.generic]]

_EPSILON = 1e-12


def divergence(
    reference: Sequence[Outputs], candidate: Sequence[Outputs], *, are_scores: bool = True
) -> float:
    """Mean damage of the candidate's outputs, 0 for equal ones; both are one mapping per model call.

    A classifier's output ([B, C], or that with trailing dimensions of 1) is compared by the KL divergence of
    its softmax from the float model's, in nats. Any other output, and with `are_scores` false every one, by its
    mean squared error divided by the float model's variance, taken per channel, where the channels are the
    shortest dimension behind the batch: so the few class scores of a detector count as much as its large box
    coordinates. Outputs are averaged. Values that are not finite are infinite damage where the float model's are
    others.
    """
    damages = [
        _output_divergence(
            [call[name] for call in reference], [call[name] for call in candidate], are_scores=are_scores
        )
        for name in reference[0]
    ]
    return float(np.mean(damages))


def _output_divergence(
    reference: Sequence[npt.NDArray[np.generic]],
    candidate: Sequence[npt.NDArray[np.generic]],
    *,
    are_scores: bool,
) -> float:
    if any(r.shape != c.shape for r, c in zip(reference, candidate, strict=True)):
        return float("inf")
    pairs = [_finite_pair(r, c) for r, c in zip(reference, candidate, strict=True)]
    reference, candidate = [r for r, _ in pairs], [c for _, c in pairs]
    if any(not np.isfinite(values).all() for values in (*reference, *candidate)):
        return float("inf")
    if are_scores and is_classifier_shape(reference[0].shape):
        return _kl_divergence(_scores(reference), _scores(candidate))
    if len({r.shape for r in reference}) > 1:  # dynamic outputs: each call on its own
        values = [_relative_error(r[None], c[None]) for r, c in zip(reference, candidate, strict=True)]
        return float(np.mean(values))
    return _relative_error(np.stack(reference), np.stack(candidate))


def _finite_pair(
    reference: npt.NDArray[np.generic], candidate: npt.NDArray[np.generic]
) -> tuple[Array, Array]:
    """Both in float64; what is not finite and the same in both, as a mask of minus infinity, is 0 in both."""
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    same = ~np.isfinite(r) & ((r == c) | (np.isnan(r) & np.isnan(c)))
    return (np.where(same, 0.0, r), np.where(same, 0.0, c)) if same.any() else (r, c)


def is_classifier_shape(shape: Sequence[int]) -> bool:
    """Whether an output of this shape reads as class scores: [B, C] with C > 1, or [B, C, 1, ...]."""
    return len(shape) >= 2 and shape[1] > 1 and all(size == 1 for size in shape[2:])


def _scores(outputs: Sequence[npt.NDArray[np.generic]]) -> Array:
    """Class scores of all calls as one [N, C] array."""
    return np.concatenate([np.asarray(o, np.float64).reshape(o.shape[0], o.shape[1]) for o in outputs])


def _kl_divergence(reference: Array, candidate: Array) -> float:
    """Mean KL divergence in nats; a softmax that the graph already holds is not applied twice."""
    if reference.min() >= 0 and np.allclose(reference.sum(axis=-1), 1, atol=1e-2):
        r, c = (np.log(np.maximum(scores, _EPSILON)) for scores in (reference, candidate))
    else:
        r, c = log_softmax(reference, axis=-1), log_softmax(candidate, axis=-1)
    return float(np.mean(np.sum(np.exp(r) * (r - c), axis=-1)))


def _relative_error(reference: npt.NDArray[np.generic], candidate: npt.NDArray[np.generic]) -> float:
    """Mean over channels of squared error over variance; axis 0 is the call, axis 1 the batch."""
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if r.size == 0:
        return 0.0
    inner = range(2, r.ndim)
    channel = min(inner, key=lambda axis: r.shape[axis] if r.shape[axis] > 1 else r.size, default=0)
    others = tuple(axis for axis in range(r.ndim) if axis != channel)
    error = ((r - c) ** 2).mean(axis=others)
    variance = r.var(axis=others) if others else np.full_like(error, r.var())
    floor = max(float(variance.mean()) * 1e-6, _EPSILON)  # a channel that never moves must not divide by zero
    return float(np.mean(error / np.maximum(variance, floor)))


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
    settled = [(probe(region), region) for region in regions]
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
