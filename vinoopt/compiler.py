"""What a target does with a candidate: its latency, its outputs, its blocks' times, its compiled form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, measure
from vinoopt.compression.judge import Yardstick
from vinoopt.errors import TargetError
from vinoopt.records import (
    Build,
    Comparison,
    CompressionPlan,
    Device,
    DeviceSpec,
    Measurement,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.host import HostToolchain, layer_times

Sample = Mapping[str, np.ndarray[Any, Any]]

_SEARCH_ROUNDS = MeasureConfig(rounds=9, min_round_ms=15, warmup_ms=40)
_FINAL_SECONDS = 6.0
"""Per contestant."""
_MAX_SAMPLES = 16
"""Inputs that measurements cycle through."""
_REFERENCE = "float"
_COMPILE_TIMEOUT_S = 600.0


def runtime_properties(plan: CompressionPlan, device: Device) -> RuntimeProperties:
    """Properties that make `device` compute a plan in the formats it names, tuned for one request at a time."""
    properties = {"PERFORMANCE_HINT": "LATENCY"}
    if device is not Device.NPU:  # an NPU takes its formats from the model alone
        properties["INFERENCE_PRECISION_HINT"] = plan.float_precision.value
    return RuntimeProperties.of(properties)


Entry = tuple[CompressionPlan, ov.Model, RuntimeProperties]
"""What takes part in a final comparison: a plan, its model, the properties it runs with."""


class SideBySide(Protocol):
    """Contestants that were timed together."""

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """In the order of the contestants."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the figures doubtful, for all contestants alike."""
        ...

    def compare(self, reference: str, candidate: str) -> Comparison:
        """How many times faster `candidate` is than `reference`."""
        ...


class TargetYardstick(Yardstick, Protocol):
    """All that the pipeline asks of a target: what the search asks, and the last steps."""

    spec: DeviceSpec

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know of this target's figures: where accuracy and times come from."""
        ...

    def compare(self, candidates: Mapping[str, Entry]) -> SideBySide:
        """All candidates side by side, as carefully as the target allows."""
        ...

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """The IR compiled for the target; a blob that may be shipped is left at `output`."""
        ...


@dataclass(kw_only=True)
class HostYardstick:
    """A device of this machine: everything is measured on it."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
    _reference_ms: float | None = field(default=None, init=False)

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """f32, then the half formats that the device computes natively."""
        halves = [p for p in self.spec.precisions if p in (Precision.BF16, Precision.F16)]
        return (Precision.F32, *halves)

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Latency of the candidate, run side by side with the float model.

        Given in units of the first measurement of the float model: what else the machine did in the meantime
        falls out of the ratio.
        """
        contestants = [
            self._contestant(_REFERENCE, CompressionPlan(), self.reference),
            self._contestant(plan.title if plan.title != _REFERENCE else "candidate", plan, model),
        ]
        result = measure(contestants, self.samples[:_MAX_SAMPLES], config=_SEARCH_ROUNDS)
        reference, candidate = result.measurements
        if self._reference_ms is None:
            self._reference_ms = reference.latency_p50_ms
        ratio = result.compare(reference.name, candidate.name).speedup
        return serde.replace(candidate, latency_p50_ms=self._reference_ms / ratio)

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        """Outputs of the candidate on the device."""
        hint = {
            k: v for k, v in runtime_properties(plan, self.spec.kind).as_dict().items() if k != "PERFORMANCE_HINT"
        }
        return predict(model, data, properties=hint, device=self.spec.kind.value)

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Microseconds per block from the device's counters."""
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return layer_times(model, self.spec.kind, properties, self.samples[:_MAX_SAMPLES], blocks=blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: everything is measured."""
        return ()

    def compare(self, candidates: Mapping[str, Entry]) -> BenchResult:
        """All candidates side by side in interleaved rounds, long enough to tell them apart."""
        contestants = [
            Contestant(
                name=name, model=model, device=self.spec.kind.value, properties=properties.as_dict()
            )
            for name, (_, model, properties) in candidates.items()
        ]
        config = MeasureConfig(seconds=_FINAL_SECONDS * len(contestants))
        return measure(contestants, self.samples[:_MAX_SAMPLES], config=config)

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """The IR compiled on the device; see `HostToolchain.compile`."""
        build = HostToolchain().compile(
            ir, self.spec, properties=properties, output=output, timeout_s=_COMPILE_TIMEOUT_S
        )
        return serde.replace(build, target=self.target)

    def _contestant(self, name: str, plan: CompressionPlan, model: ov.Model) -> Contestant:
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return Contestant(name=name, model=model, device=self.spec.kind.value, properties=properties)


def yardstick_for(
    target: Target, spec: DeviceSpec, *, reference: ov.Model, samples: Sequence[Sample]
) -> TargetYardstick:
    """How candidates are timed and run for a target; raises `TargetError` where this machine cannot serve it."""
    availability = HostToolchain().probe(spec)
    if target.profile == "host":
        if not availability.ok:
            raise TargetError(f'target "{target}": {availability.reason}; {availability.fix}')
        return HostYardstick(target=target, spec=spec, reference=reference, samples=samples)
    raise TargetError(
        f'target "{target}" is not this machine: compiling for absent devices is not part of this version yet; '
        'use "host:CPU"'
    )
