"""What a run leaves behind, and how two runs compare that were not measured side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vinoopt.bench.contestants import MeasureMode
from vinoopt.bench.intervals import SAME, compare, paired_interval
from vinoopt.bench.protocol import BenchResult
from vinoopt.errors import InputError
from vinoopt.records import Comparison, HostFingerprint, Measurement, Record

RUN_SPREAD = 0.05
"""The same model differs by up to about this share between two runs on an otherwise quiet machine: its clock, its
neighbours and the placement of memory change, and rounds of one run do not see it."""
RELATIVE_SPREAD = 0.02
"""The same for its time over that of another model beside it, while the machine keeps its pace."""
PACE_SHARE = 1.0
"""Of how much slower another model has become between two runs, what that may do to such a ratio: memory, caches and
threads that wait do not slow all models alike. Where an INT8 model of 0.22 ms took 1.32 times as long, one of 0.10 ms
took 1.53 times as long, which adds 0.54 of the change; beside the network that tells the pace it added 0.71."""
_TOLD = 0.05
"""A change of pace from which on it is told."""


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
    pace: Measurement | None = None
    """Of a small network that is always the same, which ran beside the contestants on the subject's device."""
    job: str = ""
    """Of a fleet, its name there."""
    worker: str = ""
    """Of a fleet, the address of the machine that measured it."""

    @classmethod
    def of(
        cls,
        result: BenchResult,
        host: HostFingerprint,
        *,
        inputs: str = "",
        pace: Measurement | None = None,
        job: str = "",
        worker: str = "",
    ) -> BenchRecord:
        """The record of a result; the first contestant is compared with every other."""
        return cls(
            host=host,
            mode=result.mode,
            measurements=result.measurements,
            warnings=result.warnings,
            comparisons=result.comparisons(),
            inputs=inputs,
            pace=pace,
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
    """Contestants of both runs by which the machine was cancelled out; empty: by the pace alone, if it was taken."""
    warnings: tuple[str, ...] = ()


def compare_runs(
    reference: BenchRecord, candidate: BenchRecord, *, names: tuple[str, str] = ("reference", "candidate")
) -> RunComparison:
    """The candidate's subject against the reference's, from two separate runs; `names` go before their names.

    Where the runs share contestants, each subject is taken relative to those that ran beside it, so that most of a
    slower moment or of another machine falls out of the ratio; what may be left of it widens the interval. Else the
    times themselves are compared, by the pace of the device where both runs took it. Only a difference beyond what
    two runs of the same thing show on a quiet machine, and beyond what the pace explains, is significant. Raises
    `InputError` for runs of different modes, evidence, devices or batches.
    """
    a, b = reference.subject, candidate.subject
    if reference.mode is not candidate.mode:
        raise InputError(f"one run measured {reference.mode}, the other {candidate.mode}; measure both alike")
    if a.evidence is not b.evidence:
        raise InputError(f"the runs rest on different evidence: {a.evidence}, {b.evidence}")
    if (a.device, a.batch) != (b.device, b.batch):
        one, other = (f"{each.name} on {each.device} at batch {each.batch}" for each in (a, b))
        raise InputError(f"the runs are of different things: {one}, {other}; measure both alike")
    others = {each.name for each in candidate.measurements[1:] if each.device == b.device}
    shared = [each.name for each in reference.measurements[1:] if each.name in others and each.device == a.device]
    pace = 0.0 if reference.pace is None or candidate.pace is None else _slower(reference.pace, candidate.pace)
    if shared:
        found = [_beside(_named(reference, n), _named(candidate, n), (a, b), RELATIVE_SPREAD) for n in shared]
    elif reference.pace is not None and candidate.pace is not None:
        found = [_beside(reference.pace, candidate.pace, (a, b), RUN_SPREAD)]
    else:
        found = [_alone(a, b)]
    centre = float(np.mean([each.centre for each in found]))
    half = max(*(each.half for each in found), PACE_SHARE * abs(pace))
    comparison = Comparison(
        reference=f"{names[0]}: {a.name}",
        candidate=f"{names[1]}: {b.name}",
        speedup=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
        is_significant=abs(centre) > half + math.log1p(SAME),
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
    found += _words_about_pace(reference, candidate, names)
    if not shared:
        found.append(
            "the runs share no contestant, so more of what changed on the machine between them is in the ratio; for "
            "a sharper answer measure both side by side, or give both runs the same --against"
        )
    for record, name in zip((reference, candidate), names, strict=True):
        found += [f"{name}: {warning}" for warning in (*record.warnings, *record.subject.warnings)]
    return tuple(found)


def _words(shapes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in shapes.items())


class _Found(NamedTuple):
    """How many times faster one subject is than the other, as logarithms."""

    centre: float
    half: float
    """Of its 95% interval."""


def _beside(
    theirs: Measurement, ours: Measurement, subjects: tuple[Measurement, Measurement], spread: float
) -> _Found:
    """By what ran beside both: `theirs` in the reference's run, `ours` in the candidate's."""
    first, second = compare(theirs, subjects[0]), compare(ours, subjects[1])
    halves = (math.log(each.high / each.speedup) for each in (first, second))
    half = math.hypot(*halves, math.log1p(spread), PACE_SHARE * _slower(theirs, ours))
    return _Found(math.log(second.speedup / first.speedup), half)


def _alone(theirs: Measurement, ours: Measurement) -> _Found:
    """By the subjects' times and nothing else."""
    first, second = (paired_interval(np.log(np.asarray(each.rounds_ms))) for each in (theirs, ours))
    half = math.hypot(first.high - first.centre, second.high - second.centre, math.log1p(RUN_SPREAD))
    return _Found(first.centre - second.centre, half)


def _slower(theirs: Measurement, ours: Measurement) -> float:
    """Logarithm of how many times longer the second took."""
    first, second = (paired_interval(np.log(np.asarray(each.rounds_ms))) for each in (theirs, ours))
    return second.centre - first.centre


def _words_about_pace(
    reference: BenchRecord, candidate: BenchRecord, names: tuple[str, str]
) -> tuple[str, ...]:
    if reference.pace is None or candidate.pace is None:
        return ("one of the runs did not take the pace of the device: how far it changed is not known",)
    pace = _slower(reference.pace, candidate.pace)
    if abs(pace) < math.log1p(_TOLD):
        return ()
    slower, other = names[::-1] if pace > 0 else names
    return (
        f"{reference.subject.device} took {math.exp(abs(pace)):.2f} times as long for the same in {slower} as in "
        f"{other}, which the interval allows for; for a sharper answer measure both side by side",
    )


def _named(record: BenchRecord, name: str) -> Measurement:
    return next(each for each in record.measurements if each.name == name)
