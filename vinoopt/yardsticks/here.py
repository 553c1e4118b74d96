"""A device of this machine: everything is measured on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions
from vinoopt.bench import BenchResult, Contestant, MeasureConfig
from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainMissing, ToolchainTimeout
from vinoopt.records import (
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    Measurement,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.replay import TOLERANCES, departure
from vinoopt.toolchains.calls import Call
from vinoopt.toolchains.host import npu_platform
from vinoopt.toolchains.npu_rewrites import rewrite
from vinoopt.yardsticks.base import (
    F32,
    MAX_SAMPLES,
    Entry,
    ReplayedHere,
    Sample,
    computes_integers,
    outputs_here,
    runtime_properties,
)
from vinoopt.yardsticks.places import Here, Place

_SEARCH_ROUNDS = MeasureConfig(rounds=9, min_round_ms=15, warmup_ms=40)
_REFERENCE = "float"
_PARITY_SAMPLES = 4


@dataclass(kw_only=True)
class HostYardstick(ReplayedHere):
    """A device that is there, on this machine or on a worker of a fleet: everything is measured on it."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
    place: Place = field(default_factory=Here)
    """The machine that has the device."""
    seconds: float = 4.0
    """Per contestant of a final comparison."""
    _reference_ms: float | None = field(default=None, init=False)

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """f32, then the half formats that the device computes natively; an NPU has f16 alone."""
        if self.spec.kind is Device.NPU:
            return (Precision.F16,)
        halves = [p for p in self.spec.precisions if p in (Precision.BF16, Precision.F16)]
        return (Precision.F32, *halves)

    @property
    def arithmetic(self) -> str:
        """The device's own."""
        return f"{self.spec.kind} of {self.place.identity}"

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Latency of the candidate, run side by side with the float model.

        Given in units of the first measurement of the float model: what else the machine did in the meantime
        falls out of the ratio.
        """
        return self.measure_together([(plan, model)])[0]

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        """Latencies of several candidates from the same interleaved rounds; see `measure`."""
        contestants = [self._contestant(_REFERENCE, CompressionPlan(), self.reference)]
        contestants += [
            self._contestant(f"#{number}", plan, model) for number, (plan, model) in enumerate(candidates)
        ]
        result = self.place.measure(contestants, self.samples[:MAX_SAMPLES], _SEARCH_ROUNDS)
        reference, *others = result.measurements
        if self._reference_ms is None:
            self._reference_ms = reference.latency_p50_ms
        return tuple(
            serde.replace(
                other,
                name=plan.title,
                latency_p50_ms=self._reference_ms / result.compare(_REFERENCE, other.name).speedup,
            )
            for other, (plan, _) in zip(others, candidates, strict=True)
        )

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        """Outputs of the candidate on the device."""
        hint = {
            key: value
            for key, value in runtime_properties(plan, self.spec.kind).as_dict().items()
            if key != "PERFORMANCE_HINT"
        }
        return self.place.predict(self.ready(model), data, properties=hint, device=self.spec.kind)

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Microseconds per block from the device's counters."""
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return self.place.layer_times(
            self.ready(model), self.spec.kind, properties, self.samples[:MAX_SAMPLES], blocks=blocks
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it was measured, if not here."""
        host = self.place.host
        return () if host is None else (f"measured on {host.cpu}, {self.place.name}",)

    def compare(self, candidates: Mapping[str, Entry]) -> BenchResult:
        """All candidates side by side in interleaved rounds, long enough to tell them apart."""
        contestants = [
            Contestant(
                name=name,
                model=self.ready(model),
                device=self.spec.kind.value,
                properties=properties.as_dict(),
            )
            for name, (_, model, properties) in candidates.items()
        ]
        config = MeasureConfig(seconds=self.seconds * len(contestants))
        return self.place.measure(contestants, self.samples[:MAX_SAMPLES], config)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Nothing to do: a candidate that has a latency was compiled on the device."""

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """The IR compiled on the device; see `HostToolchain.compile`.

        For GPU and NPU a diagnostic says how near their outputs are to those of this CPU in f32 on real inputs.
        Where their compiler crashes or runs out of time there is no blob, and the evidence is `NOT_CHECKED`.
        """
        try:
            build, outputs = self.place.compile(
                ir, self.spec, properties=properties, output=output, samples=self.samples[:_PARITY_SAMPLES]
            )
        except (ToolchainCrashed, ToolchainMissing, ToolchainTimeout) as exc:
            return self._without_blob(properties, exc)
        told = () if self.spec.kind is Device.CPU else (self._parity(ir, properties, outputs),)
        return serde.replace(build, target=self.target, diagnostics=(*build.diagnostics, *told))

    def replay_on(self, properties: RuntimeProperties) -> tuple[Device, RuntimeProperties]:
        """The device itself, or this machine's CPU in f32 where the device is elsewhere."""
        return (self.spec.kind, properties) if self.place.is_here else super().replay_on(properties)

    def ready(self, model: ov.Model) -> ov.Model:
        """The model in the form that the device's compiler takes: itself, but for some layers on an NPU."""
        if self.spec.kind is not Device.NPU:
            return model
        changed = model.clone()
        rewrite(changed, npu_platform(self.spec))
        return changed

    def _parity(self, ir: Path, properties: RuntimeProperties, outputs: Sequence[Call]) -> Diagnostic:
        """How far the device's outputs depart from those of this CPU in f32, as `replay.departure` counts."""
        given = self.samples[:_PARITY_SAMPLES]
        expected = outputs_here(ir, Device.CPU, F32, given)
        worst = max(
            departure(value, call[str(number)])
            for reference, call in zip(expected, outputs, strict=True)
            for number, value in enumerate(reference)
        )
        is_quantized = computes_integers(ov.Core().read_model(ir))
        hint = properties.as_dict().get("INFERENCE_PRECISION_HINT", Precision.F16.value)
        tolerance = TOLERANCES[Precision.INT8 if is_quantized else Precision(hint)]
        is_near = worst <= tolerance
        message = (
            f"outputs of {self.spec.kind} on {len(given)} real inputs depart from those of this CPU in f32 by "
            f"{worst:.2g} of their range (tolerance {tolerance:g})"
        )
        code = "HOST_PARITY" if is_near else "HOST_DEPARTS"
        return Diagnostic(severity="info" if is_near else "warning", code=code, message=message)

    def _without_blob(self, properties: RuntimeProperties, exc: ToolchainError) -> Build:
        return Build(
            target=self.target,
            toolchain="none",
            evidence=Evidence.NOT_CHECKED,
            properties=properties,
            diagnostics=(
                Diagnostic(severity="warning", code="HOST_NOT_CHECKED", message=f"no blob was made: {exc}"),
            ),
        )

    def _contestant(self, name: str, plan: CompressionPlan, model: ov.Model) -> Contestant:
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return Contestant(
            name=name, model=self.ready(model), device=self.spec.kind.value, properties=properties
        )
