"""A GPU that is not here: a roofline of its profile ranks candidates, its real driver compiles the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions
from vinoopt.cost_model import Roofline, layer_precisions, layers_with_products, roofline
from vinoopt.errors import (
    ShapeError,
    TargetError,
    ToolchainCrashed,
    ToolchainError,
    ToolchainMissing,
    ToolchainRefused,
    ToolchainTimeout,
)
from vinoopt.records import (
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    LayerReport,
    Measurement,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.store import digest
from vinoopt.toolchains.gpu import GpuToolchain, has_products, is_reference
from vinoopt.toolchains.host import known_as
from vinoopt.yardsticks.base import (
    F32_HERE,
    Entry,
    ReplayedHere,
    Sample,
    about,
    predict_in_f32,
    runtime_properties,
    saved,
    weight_bytes,
    without_intended,
)
from vinoopt.yardsticks.modelled import ModelledBench, times_of_blocks

_TIMEOUT_S = 900.0
_FLOATS = (Precision.F16, Precision.F32)
_BUILT_FLOATS = {"f16": Precision.F16, "f32": Precision.F32}
_SKIPPED: tuple[type[ToolchainError], ...] = (ToolchainMissing, ToolchainCrashed, ToolchainTimeout)
"""What says nothing about the model."""


@dataclass(kw_only=True)
class ModelledGpuYardstick(ReplayedHere):
    """A profile's GPU by the roofline of its figures; the evidence is `MODELLED`, outputs are this CPU's."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
    toolchain: GpuToolchain = field(default_factory=GpuToolchain)
    _builds: dict[str, Build] = field(default_factory=dict, init=False)
    """By content of IR and properties: what is chosen has been compiled before it is written."""
    _refusals: dict[str, ToolchainRefused] = field(default_factory=dict, init=False)
    """The same."""
    _hung: ToolchainTimeout | None = field(default=None, init=False)
    """The first time-out: a driver that hangs for one candidate would for the next, and costs its limit once."""
    _kernels: dict[tuple[bool, str], LayerReport | None] = field(default_factory=dict, init=False)
    """Whether it is quantized, and name of a layer -> what the driver made of it in the first build that had it.

    None where it made no layer with products of that name, as of products that it fused into an attention layer."""
    _has_quantized_build: bool = field(default=False, init=False)

    def require(self) -> None:
        """Raises `TargetError` where the profile lacks figures that the cost model needs.

        Raises `ToolchainRefused` where the GPU's compiler, if it is here, refuses the float model, or its shapes
        depend on its data, so that it cannot be timed by arithmetic.
        """
        needed = {each for each in self.spec.precisions if each in (*_FLOATS, Precision.INT8)}
        lacking = [f"peak_gops.{each}" for each in sorted(needed) if each not in self.spec.peak_gops]
        lacking += [] if self.spec.bandwidth_gb_per_s is not None else ["bandwidth_gb_per_s"]
        lacking += [] if self.float_precisions else ["f16 or f32 among precisions"]
        if lacking:
            raise TargetError(
                f'target "{self.target}": its profile lacks {", ".join(lacking)}, without which no candidate can '
                "be timed; give them, with their source, in a profile of your own that inherits from this one"
            )
        properties = runtime_properties(CompressionPlan(float_precision=self.float_precisions[0]), Device.GPU)
        with about(self.target), saved(self.reference) as path:
            self.compile(path, properties, path.with_name("model.blob"))
            self._roofline(CompressionPlan(float_precision=self.float_precisions[0]), self.reference)

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """The one float format worth trying: f16 where the GPU computes it natively, else f32."""
        return tuple(each for each in _FLOATS if each in self.spec.precisions)[:1]

    @property
    def notes(self) -> tuple[str, ...]:
        """Where accuracy and times come from."""
        return (
            "accuracy was judged on this CPU in f32; the GPU's f16 arithmetic is not emulated",
            f"latency is modelled from the peak rates and bandwidth of {self.spec.name}, with the precisions and "
            "kernels that its driver chose where that is here: a lower bound that ranks variants and is not a "
            "measurement",
        )

    @property
    def arithmetic(self) -> str:
        """f32 on this CPU."""
        return F32_HERE

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Modelled latency of the candidate; the same every time."""
        return self._measurement(plan.title, plan, model)

    def measure_together(
        self, candidates: Sequence[tuple[CompressionPlan, ov.Model]]
    ) -> tuple[Measurement, ...]:
        """Modelled latencies: nothing that happens at the same time changes them."""
        return tuple(self.measure(plan, model) for plan, model in candidates)

    def predict(self, plan: CompressionPlan, model: ov.Model, data: Dataset) -> Predictions:
        """Outputs of the candidate on this CPU in f32."""
        return predict_in_f32(model, data)

    def block_times(
        self, plan: CompressionPlan, model: ov.Model, blocks: Sequence[str]
    ) -> Mapping[str, float]:
        """Modelled microseconds per block."""
        layers = self._roofline(plan, model).layers
        return times_of_blocks(model, blocks, {layer.name: layer.ms * 1e3 for layer in layers})

    def compare(self, candidates: Mapping[str, Entry]) -> ModelledBench:
        """Modelled latencies of all candidates; ratios are exact, as far as the roofline goes."""
        found = tuple(self._measurement(name, plan, model) for name, (plan, model, _) in candidates.items())
        return ModelledBench(measurements=found)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Raises `ToolchainRefused` where the driver is here and refuses the candidate: its time says nothing yet."""
        with saved(model) as path:
            self.compile(path, runtime_properties(plan, Device.GPU), path.with_name("model.blob"))

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """What the GPU's own compiler makes of the IR; never a blob.

        Where the driver is missing, crashed or timed out, the build's evidence is `NOT_CHECKED` and a diagnostic
        says how to get it. Raises `ToolchainRefused` where the compiler looked at the model and said no.
        """
        content = digest(
            serde.to_json(properties), *(_sha256(ir.with_suffix(end)) for end in (".xml", ".bin"))
        )
        if content in self._refusals:
            raise self._refusals[content]
        if content not in self._builds:
            if self._hung is not None:
                return self._not_checked(properties, self._hung)
            try:
                build = self.toolchain.compile(
                    ir, self.spec, properties=properties, output=output, timeout_s=_TIMEOUT_S
                )
            except ToolchainRefused as exc:
                self._refusals[content] = exc
                raise
            except _SKIPPED as exc:
                self._hung = exc if isinstance(exc, ToolchainTimeout) else None
                return self._not_checked(properties, exc)
            self._builds[content] = serde.replace(without_intended(build, ir), target=self.target)
            self._learn(ov.Core().read_model(ir), build)
        return self._builds[content]

    def _not_checked(self, properties: RuntimeProperties, exc: ToolchainError) -> Build:
        message = f"not compiled for {self.spec.name}: {exc}"
        if isinstance(exc, ToolchainMissing):
            message += f"; {self.toolchain.probe(self.spec).fix}"
        return Build(
            target=self.target,
            toolchain="none",
            evidence=Evidence.NOT_CHECKED,
            properties=properties,
            diagnostics=(Diagnostic(severity="warning", code="GPU_NOT_CHECKED", message=message),),
        )

    def _measurement(self, name: str, plan: CompressionPlan, model: ov.Model) -> Measurement:
        found = self._roofline(plan, model)
        if found.latency_ms is None:
            raise TargetError(f'target "{self.target}": its profile lacks {", ".join(found.missing)}')
        return Measurement(
            name=name,
            device=f"{Device.GPU} of {self.target.profile}",
            evidence=Evidence.MODELLED,
            latency_p50_ms=found.latency_ms,
            size_bytes=weight_bytes(model),
            source=found.source,
            warnings=found.notes,
        )

    def _learn(self, model: ov.Model, build: Build) -> None:
        """Keeps what the driver made of each layer with products; a layer keeps its name in all candidates."""
        names, quantized = layers_with_products(model), layer_precisions(model)
        owners = known_as(model, names)
        executed = [layer for layer in build.layers if has_products(layer)]
        found = {owners[layer.name]: layer for layer in reversed(executed) if layer.name in owners}
        for block in names:
            # Recurrent layers are taken apart, and their parts are named after them.
            parts = (layer for layer in executed if layer.name.startswith(f"{block}/"))
            self._kernels.setdefault((block in quantized, block), found.get(block) or next(parts, None))

    def _roofline(self, plan: CompressionPlan, model: ov.Model) -> Roofline:
        """By what the driver makes of the layers, as far as it is known: the first quantized model is compiled."""
        quantized = layer_precisions(model)
        if quantized and not self._has_quantized_build:
            self._has_quantized_build = True
            with suppress(ToolchainRefused):  # told again where the candidate is checked
                self.check(plan, model)
        keys = {name: (name in quantized, name) for name in layers_with_products(model)}
        known = {name: self._kernels[key] for name, key in keys.items() if key in self._kernels}
        precisions = {
            name: _executed(known[name], plan, asked) if name in known else asked
            for name, asked in quantized.items()
        }
        slow = [name for name, layer in known.items() if layer is not None and is_reference(layer)]
        try:
            return roofline(
                model,
                self.spec,
                precisions=precisions,
                float_precision=plan.float_precision,
                on_vector_units=slow,
            )
        except ShapeError as exc:
            raise ToolchainRefused(f"its latency cannot be modelled: {exc}") from exc


def _executed(layer: LayerReport | None, plan: CompressionPlan, asked: Precision) -> Precision:
    """What a quantized layer computes in: what was asked for, but where the driver left it in float."""
    if layer is None:
        return plan.float_precision
    return _BUILT_FLOATS.get(layer.precision, asked)


def _sha256(path: Path) -> str:
    return serde.sha256_file(path) if path.is_file() else ""
