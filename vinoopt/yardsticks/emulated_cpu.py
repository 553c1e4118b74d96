"""A CPU that is not here: this host under its instruction set. Accuracy counts, of times only ratios do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, output_names
from vinoopt.bench import BenchResult, MeasureMode, compare
from vinoopt.errors import ToolchainCrashed, ToolchainMissing
from vinoopt.records import (
    Build,
    CompressionPlan,
    CpuOffline,
    Device,
    DeviceSpec,
    Evidence,
    Measurement,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.cpu_isa import BlockTimesJob, CappedRun, CpuIsaToolchain, Job, LatencyJob, PredictJob
from vinoopt.toolchains.process import child_folder
from vinoopt.yardsticks.base import (
    MAX_SAMPLES,
    Entry,
    Sample,
    about,
    computes_integers,
    predict_in_f32,
    runtime_properties,
    saved,
    weight_bytes,
    without_intended,
)

_TIMEOUT_S = 1800.0
_SEARCH_ROUNDS = 9
_SEARCH_ROUND_MS = 15.0
_FINAL_ROUNDS = 60
_FINAL_ROUND_MS = 50.0


@dataclass(kw_only=True)
class EmulatedCpuYardstick:
    """A profile's CPU, emulated by oneDNN's cap on the instruction set; the evidence is `EMULATED`."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
    toolchain: CpuIsaToolchain = field(default_factory=CpuIsaToolchain)
    seconds_each: float = 6.0
    """Of a final comparison, per contestant."""
    _reference_ms: float | None = field(default=None, init=False)

    def require(self) -> None:
        """Raises `ToolchainMissing` where this host lacks instructions of the profile's CPU.

        Raises `ToolchainRefused` where OpenVINO cannot compile the float model, and `ToolchainCrashed` where it
        can, but not under the cap.
        """
        found = self.toolchain.probe(self.spec)
        if not found.ok:
            raise ToolchainMissing(f'target "{self.target}": {found.reason}; {found.fix}')
        properties = runtime_properties(CompressionPlan(), Device.CPU)
        with about(self.target), saved(self.reference) as path:
            build = self.compile(path, properties, path.with_name("model.blob"))
            if build.evidence is Evidence.NOT_CHECKED:
                raise ToolchainCrashed("; ".join(each.message for each in build.diagnostics))

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """f32, then the half formats that the profile's CPU computes natively."""
        halves = [p for p in self.spec.precisions if p in (Precision.BF16, Precision.F16)]
        return (Precision.F32, *halves)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where accuracy and times come from."""
        own = self.spec.offline.isa_cap if isinstance(self.spec.offline, CpuOffline) else self._cap
        stands_in = (
            "" if own == self._cap else f" ({own}, which this host lacks and whose INT8 sums are the same)"
        )
        return (
            f"accuracy was judged, and times taken, on this host under {self._cap}, the instruction set of "
            f"{self.spec.name}{stands_in}; cores, caches and clock stayed this host's: only ratios of times mean "
            "anything",
        )

    @property
    def arithmetic(self) -> str:
        """That of the capped instruction set."""
        return f"{Device.CPU} under {self._cap}"

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Latency of the candidate, run side by side with the float model under the cap.

        Given in units of the first measurement of the float model: only the ratio between the two is known.
        """
        return self.measure_together([(plan, model)])[0]

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        """Latencies of several candidates from the same interleaved rounds; see `measure`."""
        entries = {"float": self._entry(CompressionPlan(), self.reference)}
        entries |= {f"#{i}": self._entry(plan, model) for i, (plan, model) in enumerate(candidates)}
        reference, *others = self._race(entries, rounds=_SEARCH_ROUNDS, round_ms=_SEARCH_ROUND_MS)
        if self._reference_ms is None:
            self._reference_ms = reference.latency_p50_ms
        return tuple(
            serde.replace(
                other,
                name=plan.title,
                latency_p50_ms=self._reference_ms / compare(reference, other).speedup,
            )
            for other, (plan, _) in zip(others, candidates, strict=True)
        )

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        """Outputs of the candidate under the cap: those of that instruction set, saturation included.

        A model all in f32 is run without the cap: there, instruction sets differ by the order of sums alone. A
        model that came quantized is not one, though its plan changes nothing.
        """
        if plan.float_precision is Precision.F32 and not computes_integers(model):
            return predict_in_f32(model, data)
        names = tuple(output_names(model))
        with self._saved([model]) as (path,):
            calls, outputs = path.with_name("calls.npz"), path.with_name("outputs.npz")
            write_calls(calls, (data[index] for index in range(len(data))))
            properties = runtime_properties(plan, Device.CPU)
            job = PredictJob(model=path, calls=calls, outputs=outputs, names=names, properties=properties)
            self._run(job)
            predictions = Predictions()
            for call in read_calls(outputs):
                predictions.append(call)
        if len(predictions) != len(data):
            raise ToolchainCrashed(
                f"of {len(data)} calls under {self._cap} only {len(predictions)} came back"
            )
        return predictions

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Microseconds per block from the plugin's counters under the cap."""
        with self._saved([model]) as (path,):
            job = BlockTimesJob(
                model=path,
                calls=self._calls(path),
                blocks=tuple(blocks),
                properties=runtime_properties(plan, Device.CPU),
            )
            return self._run(job).times_us

    def compare(self, candidates: Mapping[str, Entry]) -> BenchResult:
        """All candidates side by side under the cap in interleaved rounds, long enough to tell them apart."""
        seconds = self.seconds_each * len(candidates)
        found = self._race(candidates, rounds=_FINAL_ROUNDS, round_ms=_FINAL_ROUND_MS, seconds=seconds)
        return BenchResult(mode=MeasureMode.LATENCY, measurements=found)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Nothing to do: a candidate that has a latency was compiled under the cap."""

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """Kernels and precisions under the cap; the build's properties are the product's own, without the cap's."""
        build = self.toolchain.compile(
            ir, self.spec, properties=properties, output=output, timeout_s=_TIMEOUT_S
        )
        return serde.replace(without_intended(build, ir), target=self.target, properties=properties)

    def replay_on(self, properties: RuntimeProperties) -> tuple[Device, RuntimeProperties]:
        """This machine's CPU in `replay_environment`, with what the cap needs beside the product's properties."""
        return Device.CPU, self.toolchain.properties(self.spec, properties)

    @property
    def replay_environment(self) -> Mapping[str, str | None]:
        """The cap."""
        return self.toolchain.environment(self.spec)

    def golden_outputs(
        self, ir: Path, properties: RuntimeProperties, calls: Sequence[Sample]
    ) -> list[list[np.ndarray[Any, Any]]]:
        """Outputs under the cap: those of the product's CPU, saturation included."""
        names = tuple(f"{number}" for number in range(len(ov.Core().read_model(ir).outputs)))
        with child_folder() as folder:
            given, made = folder / "calls.npz", folder / "outputs.npz"
            write_calls(given, calls)
            self._run(PredictJob(model=ir, calls=given, outputs=made, names=names, properties=properties))
            return [[call[name] for name in names] for call in read_calls(made)]

    # ------------------------------------------------------------------ under the cap

    @property
    def _cap(self) -> str:
        """What is emulated: the profile's instruction set, or what stands in for it on this host."""
        own = self.spec.offline.isa_cap if isinstance(self.spec.offline, CpuOffline) else "no known cap"
        return self.toolchain.probe(self.spec).version or own

    def _entry(self, plan: CompressionPlan, model: ov.Model) -> Entry:
        return plan, model, runtime_properties(plan, Device.CPU)

    def _race(
        self, entries: Mapping[str, Entry], *, rounds: int, round_ms: float, seconds: float | None = None
    ) -> tuple[Measurement, ...]:
        models = [model for _, model, _ in entries.values()]
        with self._saved(models) as paths:
            job = LatencyJob(
                models=paths,
                rounds=rounds,
                round_ms=round_ms,
                seconds=seconds,
                calls=self._calls(paths[0]),
                properties=tuple(properties for _, _, properties in entries.values()),
            )
            run = self._run(job)
        return tuple(
            self._measurement(name, model, run, number)
            for number, (name, model) in enumerate(zip(entries, models, strict=True))
        )

    def _measurement(self, name: str, model: ov.Model, run: CappedRun, number: int) -> Measurement:
        rounds = run.samples_ms[number]
        rounds_ms = tuple(float(np.median(each)) for each in rounds)
        return Measurement(
            name=name,
            device=f"{Device.CPU} under {run.isa_cap}",
            evidence=Evidence.EMULATED,
            latency_p50_ms=float(np.median(rounds_ms)),
            samples=sum(map(len, rounds)),
            rounds_ms=rounds_ms,
            size_bytes=weight_bytes(model),
            source=f"this host under {run.isa_cap} for {self.spec.name}; only ratios mean anything",
            warnings=tuple(each.message for each in run.diagnostics),
        )

    def _run(self, job: Job) -> CappedRun:
        return self.toolchain.run_capped(self.spec, job, timeout_s=_TIMEOUT_S)

    def _calls(self, beside: Path) -> Path:
        path = beside.with_name("calls.npz")
        write_calls(path, self.samples[:MAX_SAMPLES])
        return path

    @contextmanager
    def _saved(self, models: Sequence[ov.Model]) -> Iterator[tuple[Path, ...]]:
        """The models as IR files for the child, as long as the block runs."""
        with child_folder() as folder:
            paths = tuple(folder / f"model{number}.xml" for number in range(len(models)))
            for model, path in zip(models, paths, strict=True):
                ov.save_model(model, path, compress_to_fp16=False)
            yield paths
