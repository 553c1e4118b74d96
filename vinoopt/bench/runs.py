"""What a run leaves behind, and how two runs compare that were not measured side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vinoopt.bench.contestants import MeasureMode
from vinoopt.bench.intervals import INSTANCE_SPREAD, paired_interval
from vinoopt.bench.protocol import BenchResult
from vinoopt.errors import InputError
from vinoopt.records import Comparison, HostFingerprint, Measurement, Record

RUN_SPREAD = 0.05
"""The same model differs by up to about this share between two runs on an otherwise quiet machine: its clock, its
neighbours and the placement of memory change, and rounds of one run do not see it."""


class BenchRecord(Record):
    """One run as `vinoopt bench --json` writes it and `vinoopt compare` reads it; the subject comes first."""

    schema_version: int = 1
    host: HostFingerprint
    mode: MeasureMode
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    """The subject against every other contestant of its run."""
    inputs: str = ""
    """Where the inputs came from: `random`, `golden`, or what was given as data."""
    job: str = ""
    """Of a fleet, its name there."""
    worker: str = ""
    """Of a fleet, the address of the machine that measured it."""

    @classmethod
    def of(
        cls, result: BenchResult, host: HostFingerprint, *, inputs: str = "", job: str = "", worker: str = ""
    ) -> BenchRecord:
        """The record of a result; the first contestant is compared with every other."""
        return cls(
            host=host,
            mode=result.mode,
            measurements=result.measurements,
            warnings=result.warnings,
            comparisons=result.comparisons(),
            inputs=inputs,
            job=job,
            worker=worker,
        )

    @property
    def subject(self) -> Measurement:
        """What the run was about."""
        return self.measurements[0]


class RunComparison(Record):
    """How many times faster the subject of one run is than that of another, and what stands behind it."""

    comparison: Comparison
    through: tuple[str, ...] = ()
    """Contestants of both runs by which the machine was cancelled out; empty: the times themselves were compared."""
    warnings: tuple[str, ...] = ()


def compare_runs(
    reference: BenchRecord, candidate: BenchRecord, *, names: tuple[str, str] = ("reference", "candidate")
) -> RunComparison:
    """The candidate's subject against the reference's, from two separate runs; `names` go before their names.

    Where the runs share contestants, each subject is taken relative to those that ran beside it, so that a slower
    moment or another machine falls out of the ratio. Else the times themselves are compared, and only a difference
    beyond what two runs of the same thing show (5%) is significant. Raises `InputError` for runs of different
    modes, evidence, devices or batches.
    """
    a, b = reference.subject, candidate.subject
    if reference.mode is not candidate.mode:
        raise InputError(f"one run measured {reference.mode}, the other {candidate.mode}; measure both alike")
    if a.evidence is not b.evidence:
        raise InputError(f"the runs rest on different evidence: {a.evidence}, {b.evidence}")
    if (a.device, a.batch) != (b.device, b.batch):
        one, other = (f"{each.name} on {each.device} at batch {each.batch}" for each in (a, b))
        raise InputError(f"the runs are of different things: {one}, {other}; measure both alike")
    shared = [
        name
        for name in (each.name for each in reference.measurements[1:])
        if name in {each.name for each in candidate.measurements[1:]}
    ]
    if shared:
        ratios = [(_relative(reference, name), _relative(candidate, name)) for name in shared]
        centre = float(np.mean([theirs[0] - ours[0] for theirs, ours in ratios]))
        half = max(math.hypot(theirs[1], ours[1]) for theirs, ours in ratios)
        half = math.hypot(half, math.log1p(INSTANCE_SPREAD))
    else:
        theirs, ours = _alone(a), _alone(b)
        centre = theirs[0] - ours[0]
        half = math.hypot(theirs[1], ours[1], math.log1p(RUN_SPREAD))
    comparison = Comparison(
        reference=f"{names[0]}: {a.name}",
        candidate=f"{names[1]}: {b.name}",
        speedup=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
        is_significant=abs(centre) > half,
        evidence=a.evidence,
    )
    return RunComparison(
        comparison=comparison, through=tuple(shared), warnings=_warnings(reference, candidate, shared, names)
    )


def _warnings(
    reference: BenchRecord, candidate: BenchRecord, shared: Sequence[str], names: tuple[str, str]
) -> tuple[str, ...]:
    found = []
    one, other = reference.host, candidate.host
    if (one.cpu, one.cores, one.devices) != (other.cpu, other.cores, other.devices):
        found.append(f"measured on different machines: {one.cpu} ({one.cores} cores), {other.cpu} ({other.cores})")
    versions = (one.versions.get("openvino"), other.versions.get("openvino"))
    if versions[0] != versions[1]:
        found.append(f"measured with different OpenVINO: {versions[0]}, {versions[1]}")
    if reference.inputs != candidate.inputs:
        one_origin, other_origin = (each.inputs or "not told" for each in (reference, candidate))
        found.append(f"measured on different inputs: {one_origin}, {other_origin}")
    one_shapes, other_shapes = reference.subject.shapes, candidate.subject.shapes
    if one_shapes and other_shapes and one_shapes != other_shapes:
        found.append(f"measured on inputs of different shapes: {_words(one_shapes)}, {_words(other_shapes)}")
    if not shared:
        found.append(
            "the runs share no contestant, so whatever changed on the machine between them is in the ratio; for a "
            "sharper answer measure both side by side, or give both runs the same --against"
        )
    for record, name in zip((reference, candidate), names, strict=True):
        found += [f"{name}: {warning}" for warning in (*record.warnings, *record.subject.warnings)]
    return tuple(found)


def _words(shapes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in shapes.items())


def _relative(record: BenchRecord, name: str) -> tuple[float, float]:
    """Centre and half width of log(subject / other) over the rounds of one run."""
    other = next(each for each in record.measurements if each.name == name)
    logs = np.log(np.asarray(record.subject.rounds_ms)) - np.log(np.asarray(other.rounds_ms))
    found = paired_interval(logs)
    return found.centre, found.high - found.centre


def _alone(measurement: Measurement) -> tuple[float, float]:
    found = paired_interval(np.log(np.asarray(measurement.rounds_ms)))
    return found.centre, found.high - found.centre
