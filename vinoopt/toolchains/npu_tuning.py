"""NPU compilation options, chosen by the compiler's own cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from vinoopt import serde
from vinoopt.errors import ToolchainError
from vinoopt.records import DeviceSpec, Record, RuntimeProperties
from vinoopt.toolchains.npu import DEFAULT_TIMEOUT_S, NpuEstimate, NpuToolchain
from vinoopt.toolchains.npu_compiler import MODE_PARAMS

TILES = "NPU_TILES"

OPTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "performance hint": (("PERFORMANCE_HINT", "THROUGHPUT"),),
    "weight sparsity": ((MODE_PARAMS, "enable-weights-sparsity=false"),),
    "activation sparsity": ((MODE_PARAMS, "enable-activation-sparsity=true"),),
    "optimization level": ((MODE_PARAMS, "optimization-level=3"),),
}
"""What is varied beside the number of tiles: option -> properties and values other than the default's.

Turbo, DMA engines, batch mode and precision hints changed nothing or only for the worse."""

SPARSITY_NOTE = (
    "weight sparsity made the estimate worse, through copies of sparse weights that the cost model prices far "
    "above those of dense ones; whether an NPU does too is not known"
)


class NpuTrial(Record):
    """One set of options that was compiled."""

    properties: RuntimeProperties
    option: str
    """What was changed against the best before it; `default` for the first."""
    estimate: NpuEstimate | None = None
    error: str = ""


class NpuTuning(Record):
    """The options with the smallest modelled latency, and every trial on the way."""

    properties: RuntimeProperties
    estimate: NpuEstimate
    default: NpuEstimate
    trials: tuple[NpuTrial, ...]
    notes: tuple[str, ...] = Field(default=())

    @property
    def speedup(self) -> float:
        """Modelled latency with the default options over that with the chosen ones; 1 where those are default."""
        return self.default.latency_ms / self.estimate.latency_ms


def tune_npu(
    toolchain: NpuToolchain,
    model_path: Path,
    spec: DeviceSpec,
    *,
    base: RuntimeProperties | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> NpuTuning:
    """The compilation options with the smallest estimate, found option by option; ties go to the default.

    A variant whose estimate leaves out more than the default's cannot win: it would look fast by what is not
    counted. Options that the compiler refuses are recorded and passed over. `timeout_s` is per compilation.
    Raises what `NpuToolchain.estimate_latency` raises for the base options themselves.
    """
    base = base or RuntimeProperties()
    default = toolchain.estimate_latency(model_path, spec, base, timeout_s=timeout_s)
    best, best_estimate = base, default
    trials = [NpuTrial(properties=base, option="default", estimate=default)]
    for option, values in _axes(spec):
        incumbent = best
        for key, value in values:
            variant = _with(incumbent, key, value)
            if any(trial.properties == variant for trial in trials):
                continue
            try:
                estimate = toolchain.estimate_latency(model_path, spec, variant, timeout_s=timeout_s)
            except ToolchainError as exc:
                trials.append(NpuTrial(properties=variant, option=option, error=str(exc)))
                continue
            trials.append(NpuTrial(properties=variant, option=option, estimate=estimate))
            if estimate.latency_ms < best_estimate.latency_ms and estimate.uncounted <= default.uncounted:
                best, best_estimate = variant, estimate
    return NpuTuning(
        properties=best,
        estimate=best_estimate,
        default=default,
        trials=tuple(trials),
        notes=(SPARSITY_NOTE,) if "enable-weights-sparsity=false" in _mode_params(best) else (),
    )


def _axes(spec: DeviceSpec) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """The options in the order in which they are decided; numbers of tiles are the profile's."""
    yield "tiles", tuple((TILES, value) for value in spec.tuning.get(TILES, ()))
    yield from OPTIONS.items()


def _with(properties: RuntimeProperties, key: str, value: str) -> RuntimeProperties:
    """The properties with one changed; mode parameters are added to those that are there."""
    changed = properties.as_dict()
    if key == MODE_PARAMS:
        kept = [
            word for word in _mode_params(properties) if word.partition("=")[0] != value.partition("=")[0]
        ]
        value = " ".join(sorted([*kept, value]))
    return serde.replace(properties, items=RuntimeProperties.of({**changed, key: value}).items)


def _mode_params(properties: RuntimeProperties) -> list[str]:
    return properties.as_dict().get(MODE_PARAMS, "").split()
