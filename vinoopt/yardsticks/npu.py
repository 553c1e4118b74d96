"""An NPU that is not here: Intel's compiler makes its code, and that compiler's cost model gives times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions
from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainTimeout
from vinoopt.records import (
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    Measurement,
    NpuOffline,
    Precision,
    RuntimeProperties,
    Target,
)
from vinoopt.store import Memo, Store, cache_folder
from vinoopt.toolchains.npu import DEFAULT_TIMEOUT_S, NpuEstimate, NpuToolchain
from vinoopt.toolchains.npu_rewrites import rewrite_file
from vinoopt.toolchains.npu_routes import openvino_version
from vinoopt.toolchains.npu_tuning import TILES, NpuTuning, tune_npu
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
)
from vinoopt.yardsticks.modelled import ModelledBench, times_of_blocks


@dataclass(kw_only=True)
class NpuYardstick(ReplayedHere):
    """A profile's NPU by its compiler and cost model; the evidence is `MODELLED`, outputs are this CPU's."""

    target: Target
    spec: DeviceSpec
    reference: ov.Model
    """The float model."""
    samples: Sequence[Sample]
    toolchain: NpuToolchain = field(default_factory=NpuToolchain)
    _tiles: Memo | None = field(default=None, init=False)
    """`float` and `INT8` -> number of tiles; see `_base`."""

    def require(self) -> None:
        """Raises `ToolchainMissing` where no compiler with a cost model is here: nothing could be ranked.

        Raises `ToolchainRefused` where it refuses the float model: no candidate would fare better.
        """
        with about(self.target):
            self.toolchain.require_cost_model(self.spec)
            plan = CompressionPlan(float_precision=self.float_precisions[0])
            self._estimate(self.reference, runtime_properties(plan, Device.NPU))

    @property
    def float_precisions(self) -> tuple[Precision, ...]:
        """f16: the only float format of the NPU's matrix engine."""
        return (Precision.F16,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where accuracy and times come from."""
        return (
            "accuracy was judged on this CPU in f32; the NPU's f16 arithmetic is not emulated",
            "latency is modelled by Intel's NPU compiler: it ranks variants and is not a measurement",
        )

    @property
    def arithmetic(self) -> str:
        """f32 on this CPU."""
        return F32_HERE

    def measure(self, plan: CompressionPlan, model: ov.Model) -> Measurement:
        """Modelled latency of the candidate; the same every time."""
        return self._measurement(plan.title, model, self._base(plan, model))

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
        """Modelled microseconds per block: each with its bias, its quantizers and what is fused into it."""
        estimate = self._estimate(model, self._base(plan, model))
        return times_of_blocks(model, blocks, estimate.layer_us)

    def compare(self, candidates: Mapping[str, Entry]) -> ModelledBench:
        """Modelled latencies, each with the best number of tiles; ratios are exact, as far as the cost model goes."""
        found = tuple(
            self._measurement(name, model, self._base(plan, model))
            for name, (plan, model, _) in candidates.items()
        )
        return ModelledBench(measurements=found)

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Nothing to do: a candidate that has a latency was compiled."""

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """A blob at `output`, compiled with the options that have the smallest modelled latency.

        `Build.properties` are those options; the diagnostic `NPU_TUNED` says what they gain. Layers that the
        compiler takes only in another form are replaced in the file `ir` as well, so that the NPU's own driver can
        compile it: it computes the same. Where the compiler
        crashes or runs out of time there is no blob, and the build's evidence is `NOT_CHECKED`.
        """
        try:
            tuning = tune_npu(self.toolchain, ir, self.spec, base=properties)
            build = self.toolchain.compile(
                ir, self.spec, properties=tuning.properties, output=output, timeout_s=DEFAULT_TIMEOUT_S
            )
        except (ToolchainCrashed, ToolchainTimeout) as exc:
            return self._without_blob(properties, exc)
        if isinstance(self.spec.offline, NpuOffline):
            rewrite_file(ir, self.spec.offline.platform)
        return serde.replace(
            build, target=self.target, diagnostics=(*build.diagnostics, _tuned(tuning, properties))
        )

    def _base(self, plan: CompressionPlan, model: ov.Model) -> RuntimeProperties:
        """What candidates are compiled with: the number of tiles that is best for the first of their kind.

        The compiler's default is up to twice as slow for small networks, and INT8 may need fewer tiles than float:
        with the default, the search would compare models that are not shipped. The number is kept by content of
        the float model, so that a search that is taken up again goes on with it.
        """
        default = runtime_properties(plan, Device.NPU)

        def best() -> str | None:
            with saved(model) as path:
                tuning = tune_npu(self.toolchain, path, self.spec, base=default, tiles_only=True)
            return tuning.properties.as_dict().get(TILES)

        tiles = self._kept().once("float" if plan.quantization is None else "INT8", best)
        return default if tiles is None else RuntimeProperties.of({**default.as_dict(), TILES: tiles})

    def _kept(self) -> Memo:
        if self._tiles is None:
            with saved(self.reference) as path:
                content = [serde.sha256_file(path.with_suffix(end)) for end in (".xml", ".bin")]
            key = (content, serde.to_json(self.spec), openvino_version())
            self._tiles = Store.open("tiles", *key, root=cache_folder() / "npu-estimates").memo("tiles.jsonl")
        return self._tiles

    def _without_blob(self, properties: RuntimeProperties, exc: ToolchainError) -> Build:
        message = f"no blob was made for {self.spec.name}; compile the IR on the machine itself: {exc}"
        return Build(
            target=self.target,
            toolchain="none",
            evidence=Evidence.NOT_CHECKED,
            properties=properties,
            diagnostics=(Diagnostic(severity="warning", code="NPU_NOT_CHECKED", message=message),),
        )

    def _measurement(self, name: str, model: ov.Model, properties: RuntimeProperties) -> Measurement:
        estimate = self._estimate(model, properties)
        bound = ("the modelled latency is a lower bound",) if estimate.is_lower_bound else ()
        return Measurement(
            name=name,
            device=f"{Device.NPU} of {self.target.profile}",
            evidence=Evidence.MODELLED,
            latency_p50_ms=estimate.latency_ms,
            size_bytes=weight_bytes(model),
            source=estimate.source,
            warnings=(*bound, *estimate.warnings),
        )

    def _estimate(self, model: ov.Model, properties: RuntimeProperties) -> NpuEstimate:
        with saved(model) as path:
            return self.toolchain.estimate_latency(path, self.spec, properties)


def _tuned(tuning: NpuTuning, base: RuntimeProperties) -> Diagnostic:
    """What tuning found, in a sentence."""
    changed = {k: v for k, v in tuning.properties.as_dict().items() if base.as_dict().get(k) != v}
    tried = len(tuning.trials)
    if not changed:
        message = f"of {tried} sets of compiler options none has a smaller modelled latency than the default"
    else:
        words = ", ".join(f"{key}={value}" for key, value in changed.items())
        message = (
            f"{words} has the smallest modelled latency of {tried} sets of compiler options: "
            f"{tuning.estimate.latency_ms:.4g} ms instead of {tuning.default.latency_ms:.4g} ms"
        )
    return Diagnostic(severity="info", code="NPU_TUNED", message=message)
