"""How near a setting's outputs are to the float reference's: a faster wrong answer is no gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.bench import Sample
from vinoopt.errors import DeviceError
from vinoopt.records import Record

Outputs = Sequence[Sequence[NDArray[Any]]]
"""Per sample, per output."""

COSINE_SLACK = 1e-4
"""A setting may fall short of the default's own cosine by this much: rounding in another order."""


class Parity(Record):
    """Outputs of one setting against the float reference's, over all samples together."""

    cosine: tuple[float, ...]
    """Per output."""
    agreement: float | None
    """Share of samples with the same top class, of the worst output; None where none looks like class scores."""


def run_all(compiled: ov.CompiledModel, samples: Sequence[Sample]) -> Outputs:
    """All outputs for every sample, one request after the other; raises `DeviceError` where that fails."""
    found = []
    try:
        for sample in samples:
            request = compiled.create_infer_request()  # a fresh one, so that no state is carried over
            request.infer(dict(sample))
            found.append([np.array(tensor.data) for tensor in request.output_tensors])
    except RuntimeError as exc:
        raise DeviceError(f"inference failed: {str(exc).strip().splitlines()[-1]}") from exc
    return found


def parity(outputs: Outputs, expected: Outputs) -> Parity:
    """Cosine per output, and agreement of the top class for outputs [N,classes]."""
    cosines, agreements = [], []
    for port in range(len(expected[0])):
        own = [np.asarray(each[port], np.float64) for each in outputs]
        other = [np.asarray(each[port], np.float64) for each in expected]
        cosines.append(_cosine(own, other))
        if other[0].ndim == 2 and other[0].shape[1] > 1:
            pairs = zip(own, other, strict=True)
            agreements.append(np.mean(np.concatenate([a.argmax(1) == b.argmax(1) for a, b in pairs])))
    return Parity(cosine=tuple(cosines), agreement=float(min(agreements)) if agreements else None)


def departure(found: Parity, *, min_cosine: float, min_agreement: float, default: Parity | None) -> str:
    """Why these outputs are not acceptable, with figures; empty where they are.

    Where the default itself falls short of a demand, it sets the demand.
    """
    reasons = []
    for port, cosine in enumerate(found.cosine):
        demand = min(min_cosine, default.cosine[port] - COSINE_SLACK) if default else min_cosine
        if not cosine >= demand:  # also true for NaN
            reasons.append(f"output {port} has cosine {cosine:.6f}, below {demand:.6f}")
    if found.agreement is not None:
        own = default.agreement if default and default.agreement is not None else 1.0
        demand = min(min_agreement, own)
        if found.agreement < demand:
            reasons.append(f"the top class agrees on {found.agreement:.1%} of samples, below {demand:.1%}")
    return "; ".join(reasons)


def _cosine(own: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> float:
    """1 for equal outputs, also where both are zero; NaN where one holds NaN or infinity."""
    shapes = [a.shape for a in own]
    if shapes != [b.shape for b in other]:
        return float("nan")
    a, b = (np.concatenate([each.ravel() for each in side]) for side in (own, other))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(a @ b) / norms
