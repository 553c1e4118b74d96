"""A device of this machine: everything is measured on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, measure
from vinoopt.records import (
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Measurement,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.host import HostToolchain, layer_times
from vinoopt.yardsticks.base import MAX_SAMPLES, Entry, Sample, outputs_here, runtime_properties

_SEARCH_ROUNDS = MeasureConfig(rounds=9, min_round_ms=15, warmup_ms=40)
_REFERENCE = "float"
_COMPILE_TIMEOUT_S = 600.0


@dataclass(kw_only=True)
class HostYardstick:
    """A device of this machine: everything is measured on it."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
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
        return f"{self.spec.kind} of this machine"

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
        result = measure(contestants, self.samples[:MAX_SAMPLES], config=_SEARCH_ROUNDS)
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
        return predict(model, data, properties=hint, device=self.spec.kind.value)

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Microseconds per block from the device's counters."""
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return layer_times(model, self.spec.kind, properties, self.samples[:MAX_SAMPLES], blocks=blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: everything is measured."""
        return ()

    def compare(self, candidates: Mapping[str, Entry]) -> BenchResult:
        """All candidates side by side in interleaved rounds, long enough to tell them apart."""
        contestants = [
            Contestant(name=name, model=model, device=self.spec.kind.value, properties=properties.as_dict())
            for name, (_, model, properties) in candidates.items()
        ]
        config = MeasureConfig(seconds=self.seconds * len(contestants))
        return measure(contestants, self.samples[:MAX_SAMPLES], config=config)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Nothing to do: a candidate that has a latency was compiled on the device."""

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """The IR compiled on the device; see `HostToolchain.compile`."""
        build = HostToolchain().compile(
            ir, self.spec, properties=properties, output=output, timeout_s=_COMPILE_TIMEOUT_S
        )
        return serde.replace(build, target=self.target)

    def replay_on(self, properties: RuntimeProperties) -> tuple[Device, RuntimeProperties]:
        """The device itself."""
        return self.spec.kind, properties

    @property
    def replay_environment(self) -> Mapping[str, str | None]:
        """Nothing: any process replays it."""
        return {}

    def golden_outputs(
        self, ir: Path, properties: RuntimeProperties, calls: Sequence[Sample]
    ) -> list[list[np.ndarray[Any, Any]]]:
        """Outputs by `replay_on`."""
        device, used = self.replay_on(properties)
        return outputs_here(ir, device, used, calls)

    def _contestant(self, name: str, plan: CompressionPlan, model: ov.Model) -> Contestant:
        properties = runtime_properties(plan, self.spec.kind).as_dict()
        return Contestant(name=name, model=model, device=self.spec.kind.value, properties=properties)
