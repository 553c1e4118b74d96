"""What becomes of models on targets that are not here: compiled or refused, and how fast in float and in INT8.

    python scripts/table_targets.py FOLDER --output targets.jsonl
    python scripts/table_targets.py FOLDER --model squeezenet1.0_fp32 --target lunar-lake:NPU --output out.jsonl

Every ONNX file of FOLDER is read, its open dimensions are closed (the first of an input with 1, others with
--dimension), and it is quantized with NNCF on noise: good enough for kernels and times, not for accuracy, which
is not looked at. One JSON line per model and target goes to the output, and a table to the terminal at the end.
Lines that the output already holds are not made again. By default one target stands for each NPU platform, GPU
generation and CPU instruction set of the shipped profiles.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openvino as ov
from rich.console import Console
from rich.table import Table

from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.compression.quantize import quantize
from vinoopt.errors import ToolchainError, ToolchainRefused, VinooptError
from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.frontend.parity import random_samples
from vinoopt.hardware.profile import resolve
from vinoopt.records import (
    Build,
    CompressionPlan,
    CpuOffline,
    Device,
    DeviceSpec,
    Evidence,
    QuantizationPlan,
    RuntimeProperties,
    Target,
    TensorSpec,
)
from vinoopt.toolchains.survey import alike
from vinoopt.yardsticks import EmulatedCpuYardstick, ModelledGpuYardstick, NpuYardstick, runtime_properties

CALIBRATION_SAMPLES = 10
TIMEOUT_S = 900.0
EMULATED_SECONDS = 1.5
YARDSTICKS = {
    Device.CPU: EmulatedCpuYardstick,
    Device.GPU: ModelledGpuYardstick,
    Device.NPU: NpuYardstick,
}
MAC_TYPES = frozenset({"Convolution", "GroupConvolution", "MatMul", "ConvolutionBackpropData"})
INT8 = frozenset({"i8", "u8"})


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of one model on one target."""

    model: str
    target: str
    verdict: str
    """`compiled`, `refused` (by the target's own compiler), `not checked` (says nothing about the model), or
    `not ours` (the model cannot be read or quantized at all)."""
    why: str = ""
    evidence: str = ""
    """Of the latencies."""
    float_ms: float | None = None
    int8_ms: float | None = None
    is_lower_bound: bool = False
    mac_layers: int | None = None
    mac_layers_int8: int | None = None
    on_reference: int | None = None
    """Layers with products that run on reference kernels; None where the toolchain does not tell."""
    on_shave: int | None = None
    """Layers of an NPU that run as vector programs instead of on its matrix engine."""
    seconds: float = 0.0


# --------------------------------------------------------------------------- one model


class Subject:
    """A model with fixed shapes, its noise, and what NNCF makes of it, once per kind of device."""

    def __init__(self, path: Path, dimension: int) -> None:
        source = load_model(path)
        shape = closed_shape(source.model_inputs, dimension)
        self.source: SourceModel = load_model(path, shape=shape) if shape else source
        samples = random_samples(self.source, CALIBRATION_SAMPLES)
        self.data: Dataset = from_arrays(samples, inputs=self.source.inputs)
        self._quantized: dict[tuple[Device, bool], ov.Model] = {}

    def quantized(self, spec: DeviceSpec) -> ov.Model:
        """The INT8 model for a device's rules; the model itself where it came quantized."""
        if self.source.quantized:
            return self.source.model
        overflow_fix = isinstance(spec.offline, CpuOffline) and not spec.offline.has_vnni
        key = (spec.kind, overflow_fix)
        if key not in self._quantized:
            plan = QuantizationPlan(
                subset_size=CALIBRATION_SAMPLES,
                is_transformer=self.source.is_transformer,
                overflow_fix=overflow_fix,
            )
            self._quantized[key] = quantize(self.source.model, plan, self.data, device=spec.kind)
        return self._quantized[key]


def closed_shape(inputs: Sequence[TensorSpec], dimension: int) -> str | None:
    """Shapes in which every open dimension has a size; None where none is open."""
    parts = []
    for spec in inputs:
        if all(isinstance(size, int) for size in spec.shape):
            continue
        sizes = [
            size if isinstance(size, int) else 1 if axis == 0 else dimension
            for axis, size in enumerate(spec.shape)
        ]
        parts.append(f"{spec.name}[{','.join(map(str, sizes))}]")
    return ",".join(parts) or None


# --------------------------------------------------------------------------- one model on one target


def judged(name: str, subject: Subject, target: Target) -> Line:
    """The line of a model and a target; what goes wrong becomes its verdict."""
    started = time.monotonic()
    try:
        facts = figures(subject, target)
    except ToolchainRefused as exc:
        facts = {"verdict": "refused", "why": first_line(exc)}
    except ToolchainError as exc:
        facts = {"verdict": Evidence.NOT_CHECKED.value, "why": first_line(exc)}
    except VinooptError as exc:
        facts = {"verdict": "not ours", "why": first_line(exc)}
    return Line(model=name, target=str(target), seconds=round(time.monotonic() - started, 1), **facts)


def figures(subject: Subject, target: Target) -> dict[str, Any]:
    """Latencies, and what the target's compiler made of the INT8 model."""
    spec = resolve(target)
    samples = [subject.data[index] for index in range(len(subject.data))]
    options = {"seconds_each": EMULATED_SECONDS} if spec.kind is Device.CPU else {}
    yardstick: Any = YARDSTICKS[spec.kind](
        target=target, spec=spec, reference=subject.source.model, samples=samples, **options
    )
    yardstick.require()
    precision = yardstick.float_precisions[0]
    plans = {
        "float": (CompressionPlan(float_precision=precision), subject.source.model),
        "INT8": (
            CompressionPlan(quantization=QuantizationPlan(), float_precision=precision),
            subject.quantized(spec),
        ),
    }
    entries = {
        key: (plan, model, runtime_properties(plan, spec.kind)) for key, (plan, model) in plans.items()
    }
    bench = yardstick.compare(entries)
    build = compiled(yardstick, subject.quantized(spec), entries["INT8"][2])
    slow, fast = bench.measurements
    warnings = [each.message for each in build.diagnostics if each.severity == "warning"]
    return {
        "verdict": build.evidence.value if build.evidence is Evidence.NOT_CHECKED else "compiled",
        "why": warnings[0] if warnings else "",
        "evidence": fast.evidence.value,
        "float_ms": slow.latency_p50_ms,
        "int8_ms": fast.latency_p50_ms,
        "is_lower_bound": build.is_lower_bound,
        **layer_counts(build, spec.kind),
    }


def compiled(yardstick: Any, model: ov.Model, properties: RuntimeProperties) -> Build:
    """The build of a model; an NPU's without the tuning of compiler options that a real job adds."""
    with tempfile.TemporaryDirectory(prefix="vinoopt-") as folder:
        ir = Path(folder) / "model.xml"
        ov.save_model(model, ir, compress_to_fp16=False)
        blob = ir.with_name("model.blob")
        if yardstick.spec.kind is not Device.NPU:
            build: Build = yardstick.compile(ir, properties, blob)
        else:
            build = yardstick.toolchain.compile(
                ir, yardstick.spec, properties=properties, output=blob, timeout_s=TIMEOUT_S
            )
    return build


def layer_counts(build: Build, kind: Device) -> dict[str, int | None]:
    if kind is not Device.NPU:
        keys = {
            "mac_layers": "mac_layers",
            "mac_layers_int8": "mac_layers_int8",
            "on_reference": "mac_layers_reference",
        }
        return {ours: int(build.details[key]) if key in build.details else None for ours, key in keys.items()}
    mac = [layer for layer in build.layers if layer.type in MAC_TYPES]
    vector = [layer for layer in build.layers if layer.busy_us.get("SHAVE") and not layer.busy_us.get("DPU")]
    return {
        "mac_layers": len(mac),
        "mac_layers_int8": sum(layer.precision in INT8 for layer in mac),
        "on_shave": len(vector),
    }


def first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:300]


# --------------------------------------------------------------------------- all of them


def default_targets() -> list[Target]:
    """One for each NPU platform, GPU generation and CPU instruction set."""
    return [Target(profile=next(iter(group.members)), device=group.kind) for group in alike()]


def lines_of(models: Sequence[Path], targets: Sequence[Target], options: Any) -> Iterator[Line]:
    """Lines that the output does not hold yet, model by model."""
    done = {(line.model, line.target) for line in kept(options.output)}
    for path in models:
        left = [target for target in targets if (path.stem, str(target)) not in done]
        if not left:
            continue
        try:
            subject = Subject(path, options.dimension)
        except VinooptError as exc:
            yield from (
                Line(model=path.stem, target=str(target), verdict="not ours", why=first_line(exc))
                for target in left
            )
            continue
        for target in left:
            yield judged(path.stem, subject, target)


def kept(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [Line(**json.loads(text)) for text in path.read_text(encoding="utf-8").splitlines()]


def show(lines: Sequence[Line]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = (
        "model",
        "target",
        "verdict",
        "float ms",
        "INT8 ms",
        "x",
        "INT8 layers",
        "ref",
        "SHAVE",
        "s",
        "why",
    )
    for title in columns:
        table.add_column(title, overflow="fold")
    for line in lines:
        table.add_row(*map(str, row(line)))
    Console(width=180).print(table)


def row(line: Line) -> Iterator[Any]:
    mark = "" if line.evidence == Evidence.MEASURED.value else "~"
    bound = ">" if line.is_lower_bound else ""
    yield from (line.model, line.target, line.verdict)
    yield "" if line.float_ms is None else f"{mark}{line.float_ms:.3g}"
    yield "" if line.int8_ms is None else f"{bound}{mark}{line.int8_ms:.3g}"
    yield "" if not line.float_ms or not line.int8_ms else f"{line.float_ms / line.int8_ms:.2f}"
    yield "" if line.mac_layers is None else f"{line.mac_layers_int8}/{line.mac_layers}"
    yield from ("" if count is None else count for count in (line.on_reference, line.on_shave))
    yield from (f"{line.seconds:.0f}", line.why[:90])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", help="name of a file, without .onnx; repeatable")
    parser.add_argument("--target", action="append", help="PROFILE:DEVICE; repeatable")
    parser.add_argument("--dimension", type=int, default=224, help="for open dimensions but the first")
    options = parser.parse_args()
    models = [
        p for p in sorted(options.folder.rglob("*.onnx")) if not options.model or p.stem in options.model
    ]
    targets = [Target.parse(text) for text in options.target] if options.target else default_targets()
    for line in lines_of(models, targets, options):
        with options.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(line)) + "\n")
        print(f"{line.model} {line.target}: {line.verdict} {line.why}"[:160], flush=True)
    show(kept(options.output))


if __name__ == "__main__":
    main()
