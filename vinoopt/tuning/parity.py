"""How near a setting's outputs are to the float reference's: a faster wrong answer is no gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.bench import Sample
from vinoopt.errors import DeviceError
from vinoopt.records import Record
from vinoopt.toolchains.host import reason_of

Outputs = Sequence[Sequence[NDArray[Any]]]
"""Per sample, per output."""

COSINE_SLACK = 1e-4
"""A setting may fall short of the default's own cosine by this much: rounding in another order."""
ERROR_SLACK = 1.1
"""And its error may be so many times the default's."""
WORST_FACTOR = 10.0
"""The worst sample may be so many times as far from a cosine of 1 as all samples together."""
_SILENT = 1e-6
"""Of the usual length of an output's samples: below it a sample has no direction."""


class Parity(Record):
    """Outputs of one setting against the float reference's: over all samples together, and the worst of them.

    An output that holds ids (integers of 16 bits or more, or truth values) counts in the agreement alone.
    """

    cosine: tuple[float | None, ...]
    """Per output; None for ids."""
    agreement: float | None
    """Of the worst output, the share of samples with the same top class or of ids that are the same; None where no
    output looks like class scores or ids."""
    error: tuple[float | None, ...] = ()
    """Per output, the root of the squared error over the reference's variation about its channel means; infinite
    where a value is not finite. Unlike the cosine it sees what moves on top of a large constant."""
    worst: tuple[float | None, ...] = ()
    """Per output, the lowest cosine of a single sample."""
    worst_sample: tuple[int | None, ...] = ()
    """Its place."""
    shapes: tuple[str, ...] = ()
    """Which outputs have another shape than the reference's, in words; these are not compared further."""


def run_all(compiled: ov.CompiledModel, samples: Sequence[Sample]) -> Outputs:
    """All outputs for every sample, one request after the other; raises `DeviceError` where that fails."""
    found = []
    try:
        for sample in samples:
            request = compiled.create_infer_request()  # a fresh one, so that no state is carried over
            request.infer(dict(sample))
            found.append([np.array(tensor.data) for tensor in request.output_tensors])
    except RuntimeError as exc:
        raise DeviceError(f"inference failed: {reason_of(exc)}") from exc
    return found


def parity(outputs: Outputs, expected: Outputs) -> Parity:
    """The outputs of every sample against those expected; see `Parity`."""
    found = [_port_parity(port, outputs, expected) for port in range(len(expected[0]))]
    agreements = [each.agreement for each in found if each.agreement is not None]
    return Parity(
        cosine=tuple(each.cosine for each in found),
        agreement=min(agreements, default=None),
        error=tuple(each.error for each in found),
        worst=tuple(each.worst for each in found),
        worst_sample=tuple(each.worst_sample for each in found),
        shapes=tuple(each.shape for each in found if each.shape),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PortParity:
    cosine: float | None = None
    agreement: float | None = None
    error: float | None = None
    worst: float | None = None
    worst_sample: int | None = None
    shape: str = ""


def _port_parity(port: int, outputs: Outputs, expected: Outputs) -> _PortParity:
    own, other = ([np.asarray(each[port]) for each in side] for side in (outputs, expected))
    for a, b in zip(own, other, strict=True):
        if a.shape != b.shape:
            return _PortParity(
                cosine=float("nan"), shape=f"output {port} has shape {list(a.shape)} instead of {list(b.shape)}"
            )
    if other[0].dtype.kind == "b" or (other[0].dtype.kind in "iu" and other[0].dtype.itemsize > 1):
        return _PortParity(agreement=_share([a == b for a, b in zip(own, other, strict=True)]))
    singles = [_cosine([a], [b], floor=_SILENT * _length(other)) for a, b in zip(own, other, strict=True)]
    place = int(np.argmin(singles))  # of NaN the first
    is_scores = other[0].ndim == 2 and other[0].shape[1] > 1
    tops = [a.argmax(1) == b.argmax(1) for a, b in zip(own, other, strict=True)] if is_scores else []
    return _PortParity(
        cosine=_cosine(own, other),
        agreement=_share(tops) if is_scores else None,
        error=relative_error(own, other),
        worst=singles[place],
        worst_sample=place,
    )


def departure(found: Parity, *, min_cosine: float, min_agreement: float, default: Parity | None) -> str:
    """Why these outputs are not acceptable, with figures; empty where they are.

    Cosine per output, centred error (no more than what brings a centred signal to that cosine), the worst sample,
    and agreement. Where the default itself falls short of a demand, it sets the demand.
    """
    known = default if default is not None else Parity(cosine=(), agreement=None)
    reasons = [each for each in found.shapes if each not in known.shapes]
    for port, cosine in enumerate(found.cosine):
        if cosine is None or any(each.startswith(f"output {port} ") for each in (*found.shapes, *known.shapes)):
            continue
        demand = _least(min_cosine, _at(known.cosine, port), COSINE_SLACK)
        if not cosine >= demand:  # also true for NaN
            reasons.append(f"output {port} has cosine {cosine:.6f}, below {demand:.6f}")
        limit = max(error_at(min_cosine), ERROR_SLACK * (_at(known.error, port) or 0.0))
        error = _at(found.error, port)
        if error is not None and not error <= limit:
            reasons.append(f"output {port} is off by {error:.2%} of its variation, above {limit:.2%}")
        worst, least = _at(found.worst, port), 1 - WORST_FACTOR * (1 - min_cosine)
        demand = _least(least, _at(known.worst, port), WORST_FACTOR * COSINE_SLACK)
        if worst is not None and not worst >= demand:
            place = found.worst_sample[port]
            reasons.append(f"sample {place} has cosine {worst:.6f} in output {port}, below {demand:.6f}")
    if found.agreement is not None:
        demand = min(min_agreement, known.agreement if known.agreement is not None else 1.0)
        if found.agreement < demand:
            reasons.append(f"top classes or ids agree on {found.agreement:.1%} of samples, below {demand:.1%}")
    return "; ".join(reasons)


def error_at(cosine: float) -> float:
    """The relative error that brings a centred signal to this cosine."""
    return float(np.sqrt(2 * max(1 - cosine, 0.0)))


def _least(demand: float, default: float | None, slack: float) -> float:
    """The demand, or what the default reaches where that is less."""
    return demand if default is None or np.isnan(default) else min(demand, default - slack)


def _at(figures: Sequence[float | None], port: int) -> float | None:
    return figures[port] if port < len(figures) else None


def _share(same: Sequence[NDArray[np.bool_]]) -> float:
    flat = np.concatenate([each.ravel() for each in same])
    return float(flat.mean()) if flat.size else 1.0


def _length(arrays: Sequence[NDArray[Any]]) -> float:
    """The root mean square of the samples' lengths, over values that are finite."""
    values = [np.where(np.isfinite(each), each, 0.0).astype(np.float64) for each in arrays]
    return float(np.sqrt(np.mean([np.square(each).sum() for each in values])))


def _cosine(own: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]], *, floor: float = 0.0) -> float:
    """1 for equal outputs, and where neither is longer than the floor; NaN where one holds NaN or infinity."""
    a, b = (np.concatenate([np.asarray(each, np.float64).ravel() for each in side]) for side in (own, other))
    counts = np.isfinite(b) | ~((a == b) | (np.isnan(a) & np.isnan(b)))  # infinite as expected says nothing
    a, b = a[counts], b[counts]
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if max(lengths) <= floor:
        return 1.0
    product = lengths[0] * lengths[1]
    return float(a @ b) / product if product else 0.0


def relative_error(own: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> float:
    """Root of the squared error over the reference's variation about the means of its channels (axis 1)."""
    shapes = [each.shape for each in own]
    if shapes != [each.shape for each in other]:
        return float("inf")
    if len(set(shapes)) > 1:  # rows that a model selects: their number is not the same for every sample
        own, other = ([each.ravel() for each in side] for side in (own, other))
        own, other = [np.concatenate(own)[None]], [np.concatenate(other)[None]]
    channels = 1 if other[0].ndim > 1 and len(set(shapes)) == 1 else 0
    a, b = (np.concatenate([_columns(each, channels) for each in side], axis=1) for side in (own, other))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    difference = np.where(same, 0.0, a - np.where(same, a, b))
    kept = np.where(np.isfinite(b), b, 0.0)
    power = float(np.square(kept - kept.mean(axis=1, keepdims=True)).sum())
    if power == 0:
        power = float(np.square(kept).sum())
    noise = float(np.square(difference).sum())
    return float(np.sqrt(noise / power)) if power else (0.0 if noise == 0 else float("inf"))


def _columns(array: NDArray[Any], channels: int) -> NDArray[np.float64]:
    """The array as [channels, values]."""
    if array.ndim == 0:
        return np.asarray(array, np.float64).reshape(1, 1)
    moved = np.moveaxis(np.asarray(array, np.float64), channels, 0)
    return moved.reshape(moved.shape[0], -1)
