"""Measured figures for a hardware profile: peak rates, memory bandwidth, latency of operators by channel width.

    python scripts/bench_device.py                                      # every device that OpenVINO lists
    python scripts/bench_device.py --device NPU --seconds 120 --profile lunar-lake-lab.toml

Peak: the largest sustained rate of chains of large convolutions and matrix products, grown until one inference
takes long enough; one request at a time, as the cost model counts. Every format that the device computes natively
is tried, and counts only where the device's own report says that the layers ran in it. Bandwidth: elementwise
sums of tensors that no cache holds, counting what the executed layers read and write. Operators: one layer of a
chain of 16, at channel widths that fill the vectors and at some that do not.

One JSON line per result goes to --output and to the terminal, a table at the end; the first line is the fingerprint
of the machine. Peaks and bandwidth go to --profile: a profile file that inherits from the shipped profile which fits
this machine (or from --inherits), else one that stands alone. `vinoopt profiles check` accepts it as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from rich.console import Console
from rich.table import Table

from vinoopt.bench import Contestant, MeasureConfig, measure
from vinoopt.bench.conditions import evidence_here, require_device
from vinoopt.cost_model import layer_costs
from vinoopt.errors import DeviceError, InputError, VinooptError
from vinoopt.hardware.detect import detect_host, fingerprint, match_host
from vinoopt.hardware.profile import check_profile, load_profile
from vinoopt.records import Device, DeviceSpec, Evidence, HostFingerprint, Precision
from vinoopt.toolchains.host import describe_layers, reason_of

SCRIPT = "scripts/bench_device.py"
LONG_ENOUGH_MS = 20.0
"""An inference of this length hides what a call costs; larger layers bring no higher rate."""
PEAK_LAYERS = 4
OPERATOR_LAYERS = 16
LEAST_MEGABYTES = 128
CACHES = Path("/sys/devices/system/cpu")
SIDE = 28
ACTIVATION_RANGE = 4.0
EXECUTED_AS = {Precision.INT8: {"i8", "u8", "int8", "uint8"}}
"""What a device's report calls a format, where that is not its own name."""
PRODUCTS = frozenset({"Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Gemm"})
PEAK_SIZES = {
    "convolution 3x3": ((64, 56), (128, 56), (256, 56), (512, 56), (1024, 56)),
    "matrix product": ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)),
}
"""Channels and side, or columns and rows; tried in this order."""
CALLS_PER_FORMAT = 8
"""Calls of `measure` for one format: about two sizes of each kind for the peak, and four operators."""
FEW_SECONDS = 30.0
"""A run that may take no longer than this looks at few widths."""
WIDTHS = (16, 24, 32, 40, 48, 64, 96, 128)
QUICK_WIDTHS = (32, 40, 64)

Layer = Callable[[Any, int, np.random.Generator, bool], Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure, or why there is none."""

    device: str
    what: str
    """`peak`, `bandwidth`, `operator`."""
    pattern: str
    precision: str
    value: float | None = None
    unit: str = ""
    p50_ms: float | None = None
    """Of one inference of the whole graph."""
    evidence: str = ""
    why: str = ""
    """Why it does not count."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A device with the time that is left for each of its measurements."""

    device: str
    spec: DeviceSpec
    seconds: float
    """Per call of `measure`."""
    megabytes: int
    widths: tuple[int, ...]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, models: dict[str, ov.CompiledModel], samples: dict[str, Any]) -> dict[str, Any]:
        """Measurements side by side, and the warnings of the run, by name."""
        contestants = [
            Contestant(name=name, model=model, device=self.device, samples=[samples[name]])
            for name, model in models.items()
        ]
        config = MeasureConfig(seconds=self.seconds, min_round_ms=5, warmup_ms=15)
        result = measure(contestants, [], config=config)
        return {m.name: (m, (*result.warnings, *m.warnings)) for m in result.measurements}


# --------------------------------------------------------------------------- graphs


def quantized(value: Any, low: float, high: float, levels: int) -> Any:
    ends = [np.float32(low), np.float32(high)]
    return ops.fake_quantize(value, *ends, *ends, levels)


def weights(shape: Sequence[int], rng: np.random.Generator, in_int8: bool) -> Any:
    values = rng.standard_normal(shape, np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    constant = ops.constant(values)
    bound = float(np.abs(values).max())
    return quantized(constant, -bound, bound, 255) if in_int8 else constant


def convolution(side: int) -> Layer:
    def layer(x: Any, channels: int, rng: np.random.Generator, in_int8: bool) -> Any:
        pads = [side // 2, side // 2]
        kernel = weights((channels, channels, side, side), rng, in_int8)
        return ops.convolution(x, kernel, [1, 1], pads, pads, [1, 1])

    return layer


def depthwise(x: Any, channels: int, rng: np.random.Generator, in_int8: bool) -> Any:
    kernel = weights((channels, 1, 1, 3, 3), rng, in_int8)
    return ops.group_convolution(x, kernel, [1, 1], [1, 1], [1, 1], [1, 1])


def product(x: Any, channels: int, rng: np.random.Generator, in_int8: bool) -> Any:
    return ops.matmul(x, weights((channels, channels), rng, in_int8), False, True)


def chain(
    layer: Layer, shape: Sequence[int], channels: int, count: int, bench: Bench, in_int8: bool
) -> ov.Model:
    """`count` layers with ReLU between them, quantized as NNCF does it."""
    x = ops.parameter(list(shape), np.float32, name="x")
    y = x
    for _ in range(count):
        if in_int8:
            y = quantized(y, 0.0, ACTIVATION_RANGE, 256)
        y = ops.relu(layer(y, channels, bench.rng, in_int8))
    return ov.Model([y], [x], "chain")


def macs(model: ov.Model) -> int:
    return sum(cost.macs for cost in layer_costs(model))


def properties(precision: Precision, bench: Bench) -> dict[str, str]:
    found = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not Precision.INT8 and bench.spec.kind is not Device.NPU:  # an NPU takes f16 alone
        found["INFERENCE_PRECISION_HINT"] = str(precision)
    elif bench.spec.kind is Device.CPU:
        found["INFERENCE_PRECISION_HINT"] = "f32"
    return found


def compiled_for(model: ov.Model, bench: Bench, precision: Precision) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(model, bench.device, properties(precision, bench))
    except RuntimeError as exc:
        raise DeviceError(f"{bench.device} cannot compile it in {precision}: {reason_of(exc)}") from exc


def other_formats(compiled: ov.CompiledModel, precision: Precision) -> str:
    """Formats that products ran in instead; empty where all ran as asked, or the device tells none."""
    wanted = EXECUTED_AS.get(precision, {str(precision)})
    found = {layer.precision.lower() for layer in describe_layers(compiled) if layer.type in PRODUCTS}
    return ", ".join(sorted(found - wanted - {""}))


def sample(model: ov.Model, bench: Bench) -> dict[str, np.ndarray]:
    return {
        port.any_name if port.names else port.node.get_friendly_name(): (
            bench.rng.random(list(port.shape), np.float32) * np.float32(ACTIVATION_RANGE)
        )
        for port in model.inputs
    }


# --------------------------------------------------------------------------- what is measured


def peaks(bench: Bench, precision: Precision) -> Iterator[Result]:
    """Rates of each kind of chain, the layers growing until they are large enough."""
    in_int8 = precision is Precision.INT8
    for pattern, sizes in PEAK_SIZES.items():
        is_product = pattern == "matrix product"
        for channels, extent in sizes:
            shape = (extent, channels) if is_product else (1, channels, extent, extent)
            layer = product if is_product else convolution(3)
            model = chain(layer, shape, channels, PEAK_LAYERS, bench, in_int8)
            name = f"{pattern}, {'x'.join(map(str, shape))}"
            compiled = compiled_for(model, bench, precision)
            other = other_formats(compiled, precision)
            measured, warnings = bench.run({name: compiled}, {name: sample(model, bench)})[name]
            yield Result(
                device=bench.device,
                what="peak",
                pattern=name,
                precision=str(precision),
                value=2 * macs(model) / (measured.latency_p50_ms * 1e6),
                unit="GOPS",
                p50_ms=measured.latency_p50_ms,
                evidence=str(measured.evidence),
                why=f"computed in {other}" if other else "",
                warnings=warnings,
            )
            if other or measured.latency_p50_ms > LONG_ENOUGH_MS:
                break


def moved_bytes(compiled: ov.CompiledModel) -> int:
    """Bytes that the executed layers read and write, each tensor once per layer; 0 where none are listed."""
    listed = {layer.name for layer in describe_layers(compiled)}
    nodes = [n for n in compiled.get_runtime_model().get_ordered_ops() if n.get_friendly_name() in listed]
    ports = [port for node in nodes for port in (*node.input_values(), *node.outputs())]
    return sum(4 * int(np.prod(port.get_partial_shape().to_shape())) for port in ports)


def cache_megabytes() -> float:
    """All last-level caches of this machine's CPUs; 0 where the system does not tell."""
    found = {}
    for index in CACHES.glob("cpu[0-9]*/cache/index3"):
        text = (index / "size").read_text().strip()  # as 32768K
        found[(index / "shared_cpu_list").read_text()] = int(text.rstrip("K")) * 1024 / 1e6
    return sum(found.values())


def bandwidths(bench: Bench) -> Iterator[Result]:
    """Two elementwise graphs: through the doors, and from a constant that lies in the device's own memory."""
    rows = bench.megabytes * 1_000_000 // 4 // 1024
    a, b = (ops.parameter([1, rows, 32, 32], np.float32, name=name) for name in "ab")
    one = ops.parameter([1, 1, 1, 1], np.float32, name="one")
    held = ops.constant(bench.rng.random((1, rows, 32, 32), np.float32))
    graphs = {
        "sum of two inputs": ov.Model([ops.add(a, b)], [a, b], "inputs"),
        "sum with a constant, then its largest": ov.Model(
            [ops.reduce_max(ops.add(held, one), np.array([2, 3]), True)], [one], "constant"
        ),
    }
    cache = cache_megabytes()
    for number, (name, model) in enumerate(graphs.items()):
        compiled = compiled_for(model, bench, Precision.F32)
        moved = moved_bytes(compiled)
        if not moved and number:
            return  # a compiler that does not tell its layers may have fused these two into one pass
        measured, warnings = bench.run({name: compiled}, {name: sample(model, bench)})[name]
        yield Result(
            device=bench.device,
            what="bandwidth",
            pattern=f"{name}, {bench.megabytes} MB",
            precision="f32",
            value=(moved or 3 * rows * 4096) / (measured.latency_p50_ms * 1e6),
            unit="GB/s",
            p50_ms=measured.latency_p50_ms,
            evidence=str(measured.evidence),
            why=f"the CPU's caches hold {cache:.0f} MB" if bench.megabytes < cache else "",
            warnings=warnings,
        )


def operators(bench: Bench, precision: Precision) -> Iterator[Result]:
    """Microseconds of one layer at each width; the widths of an operator run side by side."""
    in_int8 = precision is Precision.INT8
    kinds = {"convolution 3x3": convolution(3), "convolution 1x1": convolution(1), "depthwise 3x3": depthwise,
             "matrix product": product}  # fmt: skip
    for kind, layer in kinds.items():
        compiled, samples, others = {}, {}, {}
        for width in bench.widths:
            shape = (SIDE * SIDE, width) if layer is product else (1, width, SIDE, SIDE)
            model = chain(layer, shape, width, OPERATOR_LAYERS, bench, in_int8)
            name = f"{kind}, {'x'.join(map(str, shape))}"
            compiled[name] = compiled_for(model, bench, precision)
            samples[name] = sample(model, bench)
            others[name] = other_formats(compiled[name], precision)
        for name, (measured, warnings) in bench.run(compiled, samples).items():
            yield Result(
                device=bench.device,
                what="operator",
                pattern=name,
                precision=str(precision),
                value=measured.latency_p50_ms * 1e3 / OPERATOR_LAYERS,
                unit="us per layer",
                p50_ms=measured.latency_p50_ms,
                evidence=str(measured.evidence),
                why=f"computed in {others[name]}" if others[name] else "",
                warnings=warnings,
            )


def results(bench: Bench) -> Iterator[Result]:
    """All that the device can be asked; what it refuses is a result without a figure."""
    formats = [name for name in bench.spec.precisions if name is not Precision.INT4]
    jobs: list[tuple[str, str, Callable[[], Iterator[Result]]]] = [
        ("bandwidth", "f32", lambda: bandwidths(bench)),
        *(("peak", str(name), lambda name=name: peaks(bench, name)) for name in formats),
        *(("operator", str(name), lambda name=name: operators(bench, name)) for name in formats),
    ]
    for what, precision, job in jobs:
        try:
            yield from job()
        except VinooptError as exc:
            yield Result(device=bench.device, what=what, pattern="-", precision=precision, why=str(exc))


def benches(wanted: Sequence[str], options: argparse.Namespace) -> list[Bench]:
    """One per device, the time shared among all calls of `measure` that are to come."""
    host, listed = detect_host(), ov.Core().available_devices
    for name in wanted:
        require_device(name)
    pairs = [
        (name, spec)
        for name in (wanted or listed)
        if (spec := host.devices.get(Device(name.partition(".")[0]))) is not None
    ]
    calls = sum(2 + len(spec.precisions) * CALLS_PER_FORMAT for _, spec in pairs)
    return [
        Bench(
            device=name,
            spec=spec,
            seconds=options.seconds / calls,
            megabytes=options.megabytes or max(LEAST_MEGABYTES, math.ceil(2 * cache_megabytes())),
            widths=QUICK_WIDTHS if options.seconds < FEW_SECONDS else WIDTHS,
        )
        for name, spec in pairs
    ]


# --------------------------------------------------------------------------- what is written


def machine(host: HostFingerprint) -> str:
    """The fingerprint as the words of a source."""
    others = [f"{name} {full}" for name, full in host.devices.items() if name != "CPU"]
    parts = [f"{host.cores} cores", f"{host.memory_bytes / 2**30:.0f} GiB", *others]
    return f"{host.cpu} ({', '.join(parts)}), {host.os}, OpenVINO {host.versions['openvino']}"


def fragment(found: Sequence[Result], used: Sequence[Bench], parent: str | None, host: HostFingerprint) -> str:
    """A profile file: the best figure of each kind, with its source, over the parent's or the detected facts."""
    base = load_profile(parent) if parent else detect_host()
    head = {"schema": 1, **({"inherits": parent} if parent else {"family": base.family})}
    sources = [*base.sources, f"measured by {SCRIPT} on {machine(host)}"]
    head |= {"title": f"{base.title}, measured", "sources": sources}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    seen: set[Device] = set()
    for bench in used:
        spec = base.devices.get(bench.spec.kind)
        if spec is None or spec.kind in seen:
            continue
        seen.add(spec.kind)
        mine = [each for each in found if each.device == bench.device and each.value and not each.why]
        lines += ["", f"[devices.{spec.kind}]"]
        lines += [] if parent else facts(spec)
        lines += [f"bandwidth_gb_per_s = {text}" for text in best(mine, "bandwidth", "f32")]
        rates = [(name, text) for name in spec.precisions for text in best(mine, "peak", str(name))]
        lines += ["", f"[devices.{spec.kind}.peak_gops]"] if rates else []
        lines += [f"{name} = {text}" for name, text in rates]
    return "\n".join(lines) + "\n"


def facts(spec: DeviceSpec) -> list[str]:
    known = spec.model_dump(mode="json", exclude={"kind", "bandwidth_gb_per_s", "peak_gops", "offline", "tuning"},
                            exclude_none=True)  # fmt: skip
    memory = known.pop("memory_bytes", None)
    lines = [f"{key} = {json.dumps(value)}" for key, value in known.items()]
    return lines if memory is None else [*lines, f"memory_bytes = {figure(**memory)}"]


def figure(value: float, source: str) -> str:
    return f"{{ value = {value:.12g}, source = {json.dumps(source)} }}"


def best(found: Sequence[Result], what: str, precision: str) -> list[str]:
    """The largest figure of its kind as TOML; empty where there is none."""
    fitting = [each for each in found if each.what == what and each.precision == precision]
    if not fitting:
        return []
    top = max(fitting, key=lambda each: each.value or 0.0)
    cpu = ov.Core().get_property("CPU", "FULL_DEVICE_NAME").strip()
    release = ov.__version__.partition("-")[0]
    doubt = "; the machine was not quiet" if top.warnings else ""
    source = f"measured by {SCRIPT} on {cpu}, OpenVINO {release} ({top.pattern}{doubt})"
    return [figure(float(f"{top.value:.4g}"), source)]


def show(found: Sequence[Result]) -> None:
    table = Table("device", "what", "pattern", "format", "p50 ms", "figure", "", box=None)
    for each in found:
        value = "-" if each.value is None else f"{each.value:.4g} {each.unit}"
        p50 = "-" if each.p50_ms is None else f"{each.p50_ms:.4g}"
        table.add_row(each.device, each.what, each.pattern, each.precision, p50, value, each.why)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for warning in sorted({text for each in found for text in each.warnings}):
        print(f"note: {warning}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="append", help="OpenVINO device; repeatable; default: all")
    parser.add_argument("--seconds", type=float, default=45.0, help="about how long, all devices together")
    parser.add_argument("--megabytes", type=int, help="per tensor of the bandwidth test; default: no cache holds it")
    parser.add_argument("--inherits", help="shipped profile to put the figures on; default: the one that fits")
    parser.add_argument("--output", type=Path, default=Path("device.jsonl"))
    parser.add_argument("--profile", type=Path, default=Path("device.toml"))
    options = parser.parse_args()
    try:
        return run(options)
    except VinooptError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return exc.exit_code


def tell(row: dict[str, Any], stream: TextIO) -> None:
    line = json.dumps(row)
    stream.write(line + "\n")
    stream.flush()
    print(line, flush=True)


def run(options: argparse.Namespace) -> int:
    if evidence_here() is not Evidence.MEASURED:
        raise InputError("oneDNN is capped to another CPU's instruction set: unset ONEDNN_MAX_CPU_ISA")
    used = benches(options.device or (), options)
    found: list[Result] = []
    host = fingerprint()
    with options.output.open("w", encoding="utf-8") as stream:
        tell({"what": "fingerprint", **host.model_dump(mode="json")}, stream)
        for bench in used:
            for result in results(bench):
                tell(asdict(result), stream)
                found.append(result)
    text = fragment(found, used, options.inherits or match_host(), host)
    options.profile.write_text(text, encoding="utf-8")
    show(found)
    findings = check_profile(options.profile)
    for finding in findings:
        print(f"{options.profile}: {finding.severity}: {finding.message}", file=sys.stderr)
    print(f"{options.output}: {len(found)} results; {options.profile}: a hardware profile")
    return int(any(finding.severity == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
