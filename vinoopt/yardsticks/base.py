"""What the pipeline asks of a target, whatever stands behind its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.accuracy.evaluate import Predictions, predict
from vinoopt.compression.judge import Yardstick
from vinoopt.cost_model import layer_precisions
from vinoopt.errors import ToolchainError
from vinoopt.records import (
    Build,
    Comparison,
    CompressionPlan,
    Device,
    DeviceSpec,
    Measurement,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.host import compile_here, known_as
from vinoopt.toolchains.process import child_folder

Sample: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
Entry: TypeAlias = tuple[CompressionPlan, ov.Model, RuntimeProperties]
"""What takes part in a final comparison: a plan, its model, the properties it runs with."""

MAX_SAMPLES = 16
"""Inputs that measurements cycle through."""
_FLOAT_LAYER_CODES = frozenset({"CPU_FLOAT_LAYER", "GPU_FLOAT_LAYER"})
F32 = RuntimeProperties.of({"INFERENCE_PRECISION_HINT": "f32"})
"""Exact arithmetic on this CPU, which would choose bf16 by itself where it has that."""
_STORED_INTEGERS = frozenset({"i8", "u8", "i4", "u4", "i2", "u2"})
"""Element types of constants that only quantized or compressed weights have; shapes and axes are wider."""
F32_HERE = "f32 on this CPU"
"""Name of the arithmetic of `predict_in_f32`."""


def runtime_properties(plan: CompressionPlan, device: Device) -> RuntimeProperties:
    """Properties that make `device` compute a plan in the formats it names, tuned for one request at a time."""
    properties = {"PERFORMANCE_HINT": "LATENCY"}
    if device is not Device.NPU:  # an NPU takes its formats from the model alone
        properties["INFERENCE_PRECISION_HINT"] = plan.float_precision.value
    return RuntimeProperties.of(properties)


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

    def check(self, plan: CompressionPlan, model: ov.Model) -> None:
        """Raises `ToolchainRefused` where the target's own compiler refuses a candidate.

        Says nothing where that compiler is not here, crashed or ran out of time.
        """
        ...

    def compile(self, ir: Path, properties: RuntimeProperties, output: Path) -> Build:
        """The IR compiled for the target; a blob that may be shipped is left at `output`.

        `Build.properties` are those that the result is to be run with.
        """
        ...

    def replay_on(self, properties: RuntimeProperties) -> tuple[Device, RuntimeProperties]:
        """The device of this machine, and its properties, on which golden outputs are computed and replayed."""
        ...

    @property
    def replay_environment(self) -> Mapping[str, str | None]:
        """Variables of the process that replays; None removes one. Empty: any process does."""
        ...

    def golden_outputs(
        self, ir: Path, properties: RuntimeProperties, calls: Sequence[Sample]
    ) -> list[list[np.ndarray[Any, Any]]]:
        """Outputs of the IR by `replay_on`, per call in the order of the model's outputs."""
        ...


class ReplayedHere:
    """Golden outputs by this process, for targets that are this machine or whose arithmetic cannot be run here."""

    def replay_on(self, properties: RuntimeProperties) -> tuple[Device, RuntimeProperties]:
        """This machine's CPU in f32."""
        return Device.CPU, F32

    @property
    def replay_environment(self) -> Mapping[str, str | None]:
        """Nothing: any process replays it."""
        return {}

    def golden_outputs(
        self, ir: Path, properties: RuntimeProperties, calls: Sequence[Sample]
    ) -> list[list[np.ndarray[Any, Any]]]:
        """Outputs by `replay_on`, per call in the order of the model's outputs."""
        device, used = self.replay_on(properties)
        return outputs_here(ir, device, used, calls)


@contextmanager
def about(target: Target) -> Iterator[None]:
    """Puts the target's name before the message of a toolchain's error."""
    try:
        yield
    except ToolchainError as exc:
        raise type(exc)(f'target "{target}": {exc}') from exc


@contextmanager
def saved(model: ov.Model) -> Iterator[Path]:
    """The model as an IR file, as long as the block runs."""
    with child_folder() as folder:
        path = folder / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        yield path


def computes_integers(model: ov.Model) -> bool:
    """Whether a model is quantized or holds compressed weights, whatever plan it goes with."""
    return any(
        op.get_type_name() == "FakeQuantize"
        or (
            op.get_type_name() == "Constant"
            and op.get_output_element_type(0).get_type_name() in _STORED_INTEGERS
        )
        for op in model.get_ops()
    )


def outputs_here(
    ir: Path, device: Device, properties: RuntimeProperties, calls: Sequence[Sample]
) -> list[list[np.ndarray[Any, Any]]]:
    """Outputs of an IR on a device of this machine, per call in the order of the model's outputs."""
    compiled = compile_here(ir, device, properties.as_dict())
    return [[np.array(value) for value in compiled(dict(call)).values()] for call in calls]


def predict_in_f32(model: ov.Model, data: Dataset) -> Predictions:
    """Outputs on this CPU in f32, for targets whose arithmetic cannot be run here."""
    return predict(model, data, properties=F32.as_dict())


def weight_bytes(model: ov.Model) -> int:
    """Bytes of all constants, each counted once: what the weights take on disk."""
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


def without_intended(build: Build, ir: Path) -> Build:
    """The build without warnings about float layers that are float in the IR: they were left so on purpose."""
    model = ov.Core().read_model(ir)
    quantized = known_as(model, layer_precisions(model))
    # A plugin takes recurrent layers apart and names the parts after them.
    starts = tuple(f"{name}/" for name in quantized)
    return serde.replace(
        build,
        diagnostics=tuple(
            each
            for each in build.diagnostics
            if each.code not in _FLOAT_LAYER_CODES
            or each.layer in quantized
            or (each.layer is not None and each.layer.startswith(starts))
        ),
    )
