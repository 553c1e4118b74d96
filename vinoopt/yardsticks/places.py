"""Machines that have a target's device: this one, or any that answers in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import openvino as ov

from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.bench import BenchResult, Contestant, MeasureConfig, measure
from vinoopt.records import Build, Device, DeviceSpec, HostFingerprint, RuntimeProperties
from vinoopt.toolchains.calls import Call, read_calls, write_calls
from vinoopt.toolchains.host import HostToolchain, layer_times
from vinoopt.toolchains.process import child_folder
from vinoopt.tuning import TuneConfig, TuneResult, TuneTask, tune
from vinoopt.yardsticks.base import Sample

_COMPILE_TIMEOUT_S = 600.0


class Place(Protocol):
    """A machine that has the device."""

    @property
    def name(self) -> str:
        """As the end of a sentence: `this machine`."""
        ...

    @property
    def identity(self) -> str:
        """What figures that are kept hang on: another identity, other figures."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether this process can open the device itself."""
        ...

    @property
    def host(self) -> HostFingerprint | None:
        """What measures, where it is not this machine."""
        ...

    def measure(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], config: MeasureConfig
    ) -> BenchResult:
        """See `bench.measure`."""
        ...

    def predict(
        self, model: ov.Model, data: Dataset, *, properties: Mapping[str, str], device: Device
    ) -> Predictions:
        """See `accuracy.evaluate.predict`."""
        ...

    def layer_times(
        self,
        model: ov.Model,
        device: Device,
        properties: Mapping[str, str],
        samples: Sequence[Sample],
        *,
        blocks: Sequence[str],
    ) -> Mapping[str, float]:
        """See `toolchains.host.layer_times`."""
        ...

    def compile(
        self,
        ir: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        samples: Sequence[Sample],
    ) -> tuple[Build, tuple[Call, ...]]:
        """See `HostToolchain.compile`; with the outputs of a GPU or NPU for the samples, by number."""
        ...

    def tune(self, task: TuneTask, config: TuneConfig) -> TuneResult:
        """See `tuning.tune`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Here:
    """This machine."""

    toolchain: HostToolchain = field(default_factory=HostToolchain)
    name: str = "this machine"
    identity: str = "this machine"
    is_here: bool = True
    host: HostFingerprint | None = None

    def measure(
        self, contestants: Sequence[Contestant], samples: Sequence[Sample], config: MeasureConfig
    ) -> BenchResult:
        """Side by side, in this process."""
        return measure(contestants, samples, config=config)

    def predict(
        self, model: ov.Model, data: Dataset, *, properties: Mapping[str, str], device: Device
    ) -> Predictions:
        """In this process."""
        return predict(model, data, properties=properties, device=device.value)

    def layer_times(
        self,
        model: ov.Model,
        device: Device,
        properties: Mapping[str, str],
        samples: Sequence[Sample],
        *,
        blocks: Sequence[str],
    ) -> Mapping[str, float]:
        """In this process."""
        return layer_times(model, device, properties, samples, blocks=blocks)

    def compile(
        self,
        ir: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        samples: Sequence[Sample],
    ) -> tuple[Build, tuple[Call, ...]]:
        """GPU and NPU in a child, a CPU in this process."""
        with child_folder() as folder:
            calls, outputs = folder / "calls.npz", folder / "outputs.npz"
            write_calls(calls, samples)
            build = self.toolchain.compile(
                ir,
                spec,
                properties=properties,
                output=output,
                timeout_s=_COMPILE_TIMEOUT_S,
                calls=calls,
                outputs=outputs,
            )
            return build, tuple(read_calls(outputs)) if outputs.is_file() else ()

    def tune(self, task: TuneTask, config: TuneConfig) -> TuneResult:
        """In this process."""
        return tune(task, config=config)
