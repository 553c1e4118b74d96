"""NPU compilation options, chosen by the compiler's own cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vinoopt.errors import ToolchainError
from vinoopt.records import DeviceSpec, Record, RuntimeProperties
from vinoopt.toolchains.npu import DEFAULT_TIMEOUT_S, NpuEstimate, NpuToolchain
from vinoopt.toolchains.npu_compiler import with_mode_param

TILES = "NPU_TILES"

Change = Callable[[RuntimeProperties], RuntimeProperties]


def _property(key: str, value: str) -> Change:
    return lambda properties: RuntimeProperties.of({**properties.as_dict(), key: value})


def _option(key: str, value: str) -> Change:
    return lambda properties: with_mode_param(properties, key, value)


OPTIONS: Mapping[str, tuple[Change, ...]] = {
    "performance hint": (_property("PERFORMANCE_HINT", "THROUGHPUT"),),
    "activation sparsity": (_option("enable-activation-sparsity", "true"),),
    "optimization level": (_option("optimization-level", "3"),),
}
"""What is varied beside the number of tiles: option -> changes away from the default.

Weight sparsity is decided in every compilation. Turbo, DMA engines, batch mode and precision hints changed
nothing or only for the worse."""


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
    tiles_only: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> NpuTuning:
    """The compilation options with the smallest estimate, found option by option; ties go to the default.

    `tiles_only` leaves it at the number of tiles, which matters most and takes about half of the compilations.

    A variant whose estimate leaves out more than the default's cannot win: it would look fast by what is not
    counted. Options that the compiler refuses are recorded and passed over. `timeout_s` is per compilation.
    Raises what `NpuToolchain.estimate_latency` raises for the base options themselves.
    """
    base = base or RuntimeProperties()
    default = toolchain.estimate_latency(model_path, spec, base, timeout_s=timeout_s)
    best, estimate = base, default
    trials = [NpuTrial(properties=base, option="default", estimate=default)]
    for option, changes in _axes(spec, tiles_only=tiles_only):
        incumbent = best
        for change in changes:
            variant = change(incumbent)
            if any(trial.properties == variant for trial in trials):
                continue
            trial = _try(toolchain, model_path, spec, variant=variant, option=option, timeout_s=timeout_s)
            trials.append(trial)
            if trial.estimate is not None and _beats(trial.estimate, estimate, default=default):
                best, estimate = variant, trial.estimate
    return NpuTuning(properties=estimate.properties, estimate=estimate, default=default, trials=tuple(trials))


def _try(
    toolchain: NpuToolchain,
    model_path: Path,
    spec: DeviceSpec,
    *,
    variant: RuntimeProperties,
    option: str,
    timeout_s: float,
) -> NpuTrial:
    try:
        estimate = toolchain.estimate_latency(model_path, spec, variant, timeout_s=timeout_s)
    except ToolchainError as exc:
        return NpuTrial(properties=variant, option=option, error=str(exc))
    return NpuTrial(properties=variant, option=option, estimate=estimate)


def _beats(estimate: NpuEstimate, best: NpuEstimate, *, default: NpuEstimate) -> bool:
    return estimate.latency_ms < best.latency_ms and estimate.uncounted <= default.uncounted


def _axes(spec: DeviceSpec, *, tiles_only: bool) -> Iterator[tuple[str, tuple[Change, ...]]]:
    """The options in the order in which they are decided; numbers of tiles are the profile's."""
    yield "tiles", tuple(_property(TILES, value) for value in spec.tuning.get(TILES, ()))
    if not tiles_only:
        yield from OPTIONS.items()
