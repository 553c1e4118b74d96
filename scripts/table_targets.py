"""What becomes of models on targets that are not here: compiled or refused, and how fast in float and in INT8.

    python scripts/table_targets.py FOLDER --output targets.jsonl
    python scripts/table_targets.py FOLDER --model squeezenet1.0_fp32 --target lunar-lake:NPU --output out.jsonl

Every ONNX file of FOLDER is read, its open dimensions are closed (the first of an input with 1, others with
--dimension or as --shape says), and it is quantized with NNCF on noise, once per kind of device: good enough for
kernels and times, not for accuracy, which is not looked at. Each compiler runs in a child with a time limit. One
JSON line per model and target goes to the output as soon as it is known; lines that the output already holds are
not made again, so a run that was interrupted goes on where it was, but what was not checked is tried once more. A
table of all lines follows at the end; of emulated times, which are this host's, only the ratio means anything.

By default three NPU platforms, three generations of graphics and four CPU instruction sets, of which a host may
lack one; --all takes one target for each platform, generation and instruction set of the shipped profiles.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import openvino as ov
from rich.console import Console
from rich.table import Table

from vinoopt.accuracy.datasets import Dataset, from_arrays
from vinoopt.compression.quantize import quantize
from vinoopt.errors import CompressionError, InputError, ToolchainError, ToolchainRefused, VinooptError
from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.frontend.parity import random_samples
from vinoopt.hardware.isa import saturates_int8
from vinoopt.hardware.profile import resolve
from vinoopt.records import (
    Build,
    CompressionPlan,
    Device,
    DeviceSpec,
    Evidence,
    Precision,
    QuantizationPlan,
    Target,
    TensorSpec,
)
from vinoopt.toolchains.npu import NpuToolchain
from vinoopt.toolchains.survey import alike
from vinoopt.yardsticks import EmulatedCpuYardstick, ModelledGpuYardstick, runtime_properties

CALIBRATION_SAMPLES = 10
TIMEOUT_S = 300.0
EMULATED_SECONDS = 1.5
TARGETS = (
    "meteor-lake-h:NPU",
    "lunar-lake:NPU",
    "panther-lake-h:NPU",
    "skylake:GPU",
    "ice-lake:GPU",
    "alder-lake:GPU",
    "skylake:CPU",
    "skylake-sp:CPU",
    "alder-lake:CPU",
    "ice-lake:CPU",
)
"""NPU 3720, 4000, 5010; Gen9, Gen11, Xe-LP, which the driver of Debian 12 serves;
AVX2, AVX-512, AVX2-VNNI, AVX512-VNNI."""
EVERY_TARGET = "every"
"""Stands for the target of a file that OpenVINO does not read."""
MAC_TYPES = frozenset(
    {
        "Convolution",
        "GroupConvolution",
        "ConvolutionBackpropData",
        "GroupConvolutionBackpropData",
        "MatMul",
        "LSTMCell",
        "LSTMSequence",
        "GRUCell",
        "GRUSequence",
    }
)
INT8 = frozenset({"i8", "u8"})


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of one model on one target."""

    model: str
    target: str
    verdict: str
    """`compiled` (float and INT8), `float only` (INT8 was refused), `refused` (by the target's own compiler),
    `not checked` (says nothing about the model), or `not read`."""
    why: str = ""
    evidence: str = ""
    """Of the latencies."""
    float_ms: float | None = None
    """None where the model came quantized."""
    int8_ms: float | None = None
    is_lower_bound: bool = False
    mac_layers: int | None = None
    mac_layers_int8: int | None = None
    on_reference: int | None = None
    """Layers with products that run on reference kernels; None where the toolchain does not tell."""
    on_shave: int | None = None
    """Layers of an NPU that run as vector programs instead of on its matrix engine."""
    layers: int | None = None
    """Layers of an NPU that take time on either."""
    seconds: float = 0.0


# --------------------------------------------------------------------------- one model


class Subject:
    """A model with fixed shapes, its noise, and what NNCF makes of it, once per kind of device."""

    def __init__(self, path: Path, *, dimension: int, shape: str | None) -> None:
        source = load_model(path, shape=shape)
        closed = closed_shape(source.model_inputs, dimension)
        self.source: SourceModel = load_model(path, shape=closed) if closed else source
        samples = random_samples(self.source, CALIBRATION_SAMPLES)
        self.data: Dataset = from_arrays(samples, inputs=self.source.inputs)
        self._quantized: dict[tuple[Device, bool], ov.Model] = {}

    def quantized(self, spec: DeviceSpec) -> ov.Model:
        """The INT8 model for a device's rules; the model itself where it came quantized."""
        if self.source.quantized:
            return self.source.model
        overflow_fix = saturates_int8(spec)
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
    if all(isinstance(size, int) for spec in inputs for size in spec.shape):
        return None
    parts = []
    for spec in inputs:
        sizes = [
            size if isinstance(size, int) else 1 if axis == 0 else dimension
            for axis, size in enumerate(spec.shape)
        ]
        parts.append(f"{spec.name}[{','.join(map(str, sizes))}]")
    return ",".join(parts)


# --------------------------------------------------------------------------- one model on one target


class Bench:
    """One target's compiler and clock, which a model meets in float and in INT8."""

    def __init__(self, subject: Subject, target: Target) -> None:
        self.spec = resolve(target)
        self._reference = subject.source.model
        self._yardstick: Any = None
        if self.spec.kind is not Device.NPU:
            kind = EmulatedCpuYardstick if self.spec.kind is Device.CPU else ModelledGpuYardstick
            samples = [subject.data[index] for index in range(len(subject.data))]
            self._yardstick = kind(target=target, spec=self.spec, reference=self._reference, samples=samples)
            if self.spec.kind is Device.CPU:
                self._yardstick.seconds_each = EMULATED_SECONDS
        precisions = (Precision.F16,) if self._yardstick is None else self._yardstick.float_precisions
        self.precision: Precision = precisions[0]
        """Of what is not INT8."""

    def build(self, model: ov.Model, plan: CompressionPlan) -> Build:
        """What the target's compiler makes of a model; raises what that raises."""
        properties = runtime_properties(plan, self.spec.kind)
        with tempfile.TemporaryDirectory(prefix="vinoopt-") as folder:
            ir = Path(folder) / "model.xml"
            ov.save_model(model, ir, compress_to_fp16=False)
            blob = ir.with_name("model.blob")
            build: Build
            if self._yardstick is not None:
                build = self._yardstick.compile(ir, properties, blob)
            else:  # without the tuning of compiler options that a real job adds
                build = NpuToolchain().compile(
                    ir, self.spec, properties=properties, output=blob, timeout_s=TIMEOUT_S
                )
        return build

    def times(self, contestants: dict[str, tuple[CompressionPlan, ov.Model, Build]]) -> dict[str, Any]:
        """Contestant -> its latency in milliseconds, and `evidence`."""
        if self._yardstick is None:
            found = {name: build.latency_ms for name, (_, _, build) in contestants.items()}
            return {**found, "evidence": Evidence.MODELLED.value}
        entries = {
            name: (plan, model, runtime_properties(plan, self.spec.kind))
            for name, (plan, model, _) in contestants.items()
        }
        measured = self._yardstick.compare(entries).measurements
        times: dict[str, Any] = {each.name: each.latency_p50_ms for each in measured}
        return {**times, "evidence": measured[0].evidence.value}


def judged(name: str, subject: Subject, target: Target) -> Line:
    """The line of a model and a target; what goes wrong becomes its verdict."""
    started = time.monotonic()
    try:
        facts = figures(subject, target)
    except (ToolchainRefused, InputError) as exc:
        facts = {"verdict": "refused", "why": first_line(exc)}
    except VinooptError as exc:
        facts = {"verdict": Evidence.NOT_CHECKED.value, "why": first_line(exc)}
    return Line(model=name, target=str(target), seconds=round(time.monotonic() - started, 1), **facts)


def figures(subject: Subject, target: Target) -> dict[str, Any]:
    """Latencies, and what the target's compiler made of the INT8 model."""
    bench = Bench(subject, target)
    in_float = CompressionPlan(float_precision=bench.precision)
    in_int8 = CompressionPlan(quantization=QuantizationPlan(), float_precision=bench.precision)
    made: dict[str, tuple[CompressionPlan, ov.Model, Build]] = {}
    if not subject.source.quantized:
        model = subject.source.model
        made["float"] = (in_float, model, bench.build(model, in_float))
    facts: dict[str, Any] = {"verdict": "compiled"}
    try:
        model = subject.quantized(bench.spec)
        made["INT8"] = (in_int8, model, bench.build(model, in_int8))
    except (CompressionError, ToolchainRefused) as exc:
        if not made:
            raise
        facts = {"verdict": "float only", "why": first_line(exc)}
    builds = [build for _, _, build in made.values()]
    unchecked = [build for build in builds if build.evidence is Evidence.NOT_CHECKED]
    if unchecked:
        facts["verdict"] = Evidence.NOT_CHECKED.value
    warnings = [each.message for each in (unchecked or builds)[-1].diagnostics if each.severity == "warning"]
    facts.setdefault("why", warnings[0] if warnings else "")
    times: dict[str, Any] = {}
    try:
        times = bench.times(made)
    except ToolchainRefused as exc:  # it compiles; only its time is not known
        facts["why"] = first_line(exc)
    except ToolchainError as exc:
        return {**facts, "verdict": Evidence.NOT_CHECKED.value, "why": first_line(exc)}
    return {
        **facts,
        "evidence": times.get("evidence", ""),
        "float_ms": times.get("float"),
        "int8_ms": times.get("INT8"),
        "is_lower_bound": any(build.is_lower_bound for build in builds),
        **(layer_counts(made["INT8"][2]) if "INT8" in made else {}),
    }


def layer_counts(build: Build) -> dict[str, int | None]:
    """Layers of the INT8 model by where and in what they run."""
    if build.target.device is not Device.NPU:
        keys = {
            "mac_layers": "mac_layers",
            "mac_layers_int8": "mac_layers_int8",
            "on_reference": "mac_layers_reference",
        }
        return {ours: int(build.details[key]) if key in build.details else None for ours, key in keys.items()}
    mac = [layer for layer in build.layers if layer.type in MAC_TYPES]
    busy = [layer for layer in build.layers if layer.busy_us.get("SHAVE") or layer.busy_us.get("DPU")]
    return {
        "mac_layers": len(mac),
        "mac_layers_int8": sum(layer.precision in INT8 for layer in mac),
        "on_shave": sum(not layer.busy_us.get("DPU") for layer in busy),
        "layers": len(busy),
    }


def first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:400]


# --------------------------------------------------------------------------- all of them


def every_target() -> list[Target]:
    """One for each NPU platform, GPU generation and CPU instruction set of the shipped profiles."""
    found: dict[tuple[Device, str], Target] = {}
    for group in alike():
        target = Target(profile=next(iter(group.members)), device=group.kind)
        found.setdefault((group.kind, group.generation), target)
    return list(found.values())


def lines_of(models: Sequence[Path], targets: Sequence[Target], options: Any) -> Iterator[Line]:
    """Lines that the output does not hold yet, and those that were not checked, model by model."""
    lines = kept(options.output)
    done = {(line.model, line.target) for line in lines if line.verdict != Evidence.NOT_CHECKED.value}
    shapes = dict(text.split("=", 1) for text in options.shape)
    for path in models:
        name = title(path, options.folder)
        left = [target for target in targets if (name, str(target)) not in done]
        if not left or (name, EVERY_TARGET) in done:
            continue
        try:
            subject = Subject(path, dimension=options.dimension, shape=shapes.get(name))
        except VinooptError as exc:
            yield Line(model=name, target=EVERY_TARGET, verdict="not read", why=first_line(exc))
            continue
        for target in left:
            yield judged(name, subject, target)


def title(path: Path, folder: Path) -> str:
    """The path within the folder, without `.onnx`."""
    return path.relative_to(folder).with_suffix("").as_posix()


def kept(path: Path) -> list[Line]:
    """The last line of each model and target, in the order of the first; fields that are gone are passed over."""
    if not path.is_file():
        return []
    known = {field.name for field in fields(Line)}
    found: dict[tuple[str, str], Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = Line(**{name: value for name, value in json.loads(text).items() if name in known})
        found[line.model, line.target] = line
    return list(found.values())


COLUMNS = [
    "model",
    "target",
    "verdict",
    "evidence",
    "float ms",
    "INT8 ms",
    "x",
    "INT8 layers",
    "ref",
    "SHAVE",
    "s",
    "why",
]


def show(lines: Sequence[Line]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name in ("model", "target", "verdict"))
    for line in lines:
        table.add_row(*map(str, row(line)))
    Console(width=190).print(table)


def row(line: Line) -> Iterator[Any]:
    yield from (line.model, line.target, line.verdict, line.evidence)
    for ms in (line.float_ms, line.int8_ms):
        yield "" if ms is None else shown(ms, line)
    yield "" if not line.float_ms or not line.int8_ms else f"{line.float_ms / line.int8_ms:.2f}"
    yield "" if line.mac_layers is None else f"{line.mac_layers_int8}/{line.mac_layers}"
    yield "" if line.on_reference is None else line.on_reference
    yield "" if line.on_shave is None else f"{line.on_shave}/{line.layers}"
    yield from (f"{line.seconds:.0f}", line.why[:120])


def shown(ms: float, line: Line) -> str:
    """A latency as what it is: `>` a lower bound, `~` by a cost model, `here` by this host's clock."""
    if line.evidence == Evidence.EMULATED.value:
        return f"{ms:.3g} here"
    return f"{'>' if line.is_lower_bound else ''}~{ms:.3g}"


def parsed() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", help="path in the folder, without .onnx; repeatable")
    parser.add_argument("--target", action="append", help="PROFILE:DEVICE; repeatable")
    parser.add_argument("--all", action="store_true", help="one target of every kind that is known")
    parser.add_argument("--dimension", type=int, default=224, help="for open dimensions but the first")
    parser.add_argument(
        "--shape", action="append", default=[], help='as "MODEL=x[1,3,48,192]", for one model; repeatable'
    )
    return parser.parse_args()


def main() -> None:
    options = parsed()
    models = [
        path
        for path in sorted(options.folder.rglob("*.onnx"))
        if not options.model or title(path, options.folder) in options.model
    ]
    targets = every_target() if options.all else [Target.parse(text) for text in options.target or TARGETS]
    started, fresh = time.monotonic(), 0
    for line in lines_of(models, targets, options):
        with options.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(line)) + "\n")
        print(f"{line.model} {line.target}: {line.verdict} {line.why}"[:160], flush=True)
        fresh += 1
    lines = kept(options.output)
    show(lines)
    print(
        f"{len(lines)} lines, {fresh} of them made now in {time.monotonic() - started:.0f} s; "
        f"all together took {sum(line.seconds for line in lines):.0f} s"
    )


if __name__ == "__main__":
    main()
