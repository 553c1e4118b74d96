"""Devices that are here: OpenVINO compiles for them and says what every layer became."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import openvino as ov

from vinoopt import serde
from vinoopt.errors import DeviceError
from vinoopt.records import (
    Availability,
    Build,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    LayerReport,
    NpuOffline,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.process import ChildReply, memory_limit, run_child

WORKER = "vinoopt.toolchains.host_worker"
BLOB_FILE, OUTPUTS_FILE = "model.blob", "outputs.npz"

Runner = Callable[..., ChildReply]

_PLATFORM = re.compile(r"\d{4}")
_BLOB_DEVICES = frozenset({Device.GPU, Device.NPU})
"""Devices whose compiled form is worth shipping; a CPU's is compiled from IR in less time than it takes to copy."""
RUNTIME_REQUIREMENTS = "runtime_requirements"
"""Key of `Build.details`."""
_REQUIREMENTS, _COMPATIBILITY = "RUNTIME_REQUIREMENTS", "COMPATIBILITY_CHECK"
_PROFILED_RUNS = 30
_COMPILATIONS = 3
_SETTLING_RUNS = 3
_ABOUT = "Error has occured for:"
"""The GPU plugin's words (and spelling) in front of a layer's name."""


class HostToolchain:
    """OpenVINO's own plugins on the devices of this machine; those of GPU and NPU run in a child."""

    def __init__(self, *, run: Runner = run_child) -> None:
        self._run = run

    def probe(self, spec: DeviceSpec) -> Availability:
        """Whether OpenVINO lists the device here."""
        devices = {name.partition(".")[0] for name in ov.Core().available_devices}
        if spec.kind.value in devices:
            return Availability(ok=True, name="openvino", version=ov.__version__)
        return Availability(
            ok=False,
            name="openvino",
            version=ov.__version__,
            reason=f"OpenVINO lists no {spec.kind} on this machine (it lists {', '.join(sorted(devices))})",
            fix=f"install the {spec.kind} driver, or name a shipped profile to compile without the device",
        )

    def compile(
        self,
        model_path: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
        calls: Path | None = None,
        outputs: Path | None = None,
    ) -> Build:
        """The IR at `model_path` compiled on its device, with a blob at `output` for GPU and NPU.

        Where `calls` holds inputs, as `write_calls` leaves them, a GPU's or NPU's outputs for them are left at
        `outputs`, each named by its number. For an NPU, layers that its compiler takes only in another form are
        replaced in the file `model_path`: it computes the same. A CPU compiles in this process, without the time
        limit. Raises `DeviceError` where OpenVINO refuses model or properties for the CPU, `ShapeError` and
        `ToolchainRefused` where it does, or is known to, for another device, `ToolchainCrashed` and
        `ToolchainTimeout`.
        """
        if spec.kind not in _BLOB_DEVICES:
            return _compiled_here(model_path, spec, properties)
        findings = _prepared_for_npu(model_path, spec) if spec.kind is Device.NPU else ()
        request = {
            "model": str(model_path.resolve()),
            "device": spec.kind.value,
            "properties": properties.as_dict(),
            "calls": None if calls is None else str(calls.resolve()),
        }
        values = self._run(
            WORKER,
            request=request,
            timeout_s=timeout_s,
            memory_limit_bytes=memory_limit(),
            collect={BLOB_FILE: output, **({} if outputs is None else {OUTPUTS_FILE: outputs})},
        ).values
        return Build(
            target=Target(profile=spec.name, device=spec.kind),
            toolchain=f"openvino {ov.__version__}",
            evidence=Evidence.COMPILED,
            properties=properties,
            blob=output.name,
            blob_sha256=serde.sha256_file(output),
            compile_ms=values["compile_ms"],
            layers=tuple(LayerReport(**layer) for layer in values["layers"]),
            diagnostics=findings,
            details=_details(values["requirements"]),
        )


def _details(requirements: str | None) -> dict[str, str]:
    return {} if requirements is None else {RUNTIME_REQUIREMENTS: requirements}


def _compiled_here(model_path: Path, spec: DeviceSpec, properties: RuntimeProperties) -> Build:
    started = time.monotonic()
    compiled = compile_here(model_path, spec.kind, properties.as_dict())
    compile_ms = (time.monotonic() - started) * 1e3
    return Build(
        target=Target(profile=spec.name, device=spec.kind),
        toolchain=f"openvino {ov.__version__}",
        evidence=Evidence.COMPILED,
        properties=properties,
        compile_ms=compile_ms,
        layers=tuple(describe_layers(compiled)),
        details=_details(requirements_of(compiled)),
    )


def npu_platform(spec: DeviceSpec) -> str:
    """The compiler's name for an NPU, as `4000`: the profile's, or of this machine what OpenVINO tells."""
    if isinstance(spec.offline, NpuOffline):
        return spec.offline.platform
    found = _PLATFORM.search(spec.architecture)
    return found[0] if found else spec.architecture


def _prepared_for_npu(model_path: Path, spec: DeviceSpec) -> tuple[Diagnostic, ...]:
    """What the compiler is known to dislike in an IR, whose layers are put into the form that it takes."""
    # The children that import this module need neither.
    from vinoopt.toolchains import npu_preflight, npu_rewrites

    platform = npu_platform(spec)
    findings = npu_preflight.check(npu_preflight.read_ir(model_path), platform)
    npu_preflight.refuse(findings)
    return (*findings, *npu_rewrites.rewrite_file(model_path, platform))


def compile_here(
    model: Path | ov.Model, device: Device | str, properties: Mapping[str, str]
) -> ov.CompiledModel:
    """The model compiled on a device of this machine, by kind or by OpenVINO's name (`GPU.1`).

    Raises `DeviceError` with OpenVINO's reason.
    """
    try:
        return ov.Core().compile_model(model, str(device), dict(properties))
    except RuntimeError as exc:
        raise DeviceError(
            f"OpenVINO cannot compile the model for {device} with {dict(properties)}: {reason_of(exc)}"
        ) from exc


def requirements_of(model: ov.CompiledModel) -> str | None:
    """What a compiled model says that it needs of the machine that runs it; None where its device does not tell."""
    if _REQUIREMENTS not in model.get_property("SUPPORTED_PROPERTIES"):
        return None
    try:
        return str(model.get_property(_REQUIREMENTS))
    except RuntimeError:  # listed, but not for this model
        return None


def compatibility(device: str, requirements: str) -> str | None:
    """What the device says to the requirements of a model compiled elsewhere: `supported`, `unsupported`, ...

    None where it does not answer: an older OpenVINO, or one whose Python cannot hand the answer over, as 2026.4.
    """
    core = ov.Core()
    if _COMPATIBILITY not in core.get_property(device, "SUPPORTED_PROPERTIES"):
        return None
    try:
        answer = core.get_property(device, _COMPATIBILITY, {_REQUIREMENTS: requirements})
    except (RuntimeError, TypeError):
        return None
    return str(answer).rpartition(".")[2].lower().replace("_", " ")


def reason_of(exc: RuntimeError) -> str:
    """The part of an OpenVINO error that says something: its last line, without the stack of source places.

    Of the GPU plugin's errors the lines before as well, which name the layer and the figures that disagree.
    """
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    for place, line in enumerate(lines):
        if line.startswith(_ABOUT):
            return "; ".join([line.removeprefix(_ABOUT).strip(), *lines[place + 1 :]])
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or [type(exc).__name__])[-1]


def describe_layers(compiled: ov.CompiledModel) -> Iterable[LayerReport]:
    """Every executed layer with its kernel and precision; inputs, outputs and constants are left out."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = _text(info, "layerType")
        if kind in ("Input", "Output", "Const", "Parameter", "Result", ""):
            continue
        yield LayerReport(
            name=node.get_friendly_name(),
            type=kind,
            precision=_text(info, "runtimePrecision"),
            kernel=_text(info, "primitiveType"),
        )


def layer_times(
    model: ov.Model,
    device: Device,
    properties: Mapping[str, str],
    samples: Iterable[Mapping[str, npt.NDArray[Any]]],
    *,
    blocks: Collection[str],
) -> dict[str, float]:
    """Microseconds per block, from the device's own performance counters.

    The time of an executed layer that fuses several goes to the `blocks` among the layers it came from; reorders
    and quantizers that the plugin put in go to the layer they feed. What belongs to no block is left out: it is
    the same in every plan. Of a few compilations the least time of each layer counts: another process that
    takes the core for a moment makes a layer look slow, and nothing makes it look fast. Raises `DeviceError`.
    """
    feed = list(samples)
    if not feed:
        raise DeviceError("layer times need at least one sample")
    least: dict[str, float] = {}
    origins: dict[str, list[str]] = {}
    for _ in range(_COMPILATIONS):
        compiled = compile_here(model, device, {**properties, "PERF_COUNT": "YES"})
        origins = _origins(compiled)
        for executed, value in _mean_times(compiled, feed).items():
            least[executed] = min(value, least.get(executed, value))
    times = dict.fromkeys(blocks, 0.0)
    known = known_as(model, times)
    for executed, value in least.items():
        owners = {known[name] for name in origins.get(executed, []) if name in known}
        for name in owners:
            times[name] += value / len(owners)
    return times


def known_as(model: ov.Model, blocks: Collection[str]) -> dict[str, str]:
    """Names under which a plugin may run a block: its own, its bias's, its dequantization's."""
    names = {name: name for name in blocks}
    for node in model.get_ops():
        block = node.get_friendly_name()
        if block not in blocks:
            continue
        names[f"{block}/DequantizationMultiply"] = block
        for edge in node.output(0).get_target_inputs():
            follower = edge.get_node()
            if follower.get_type_name() == "Add" and follower.get_friendly_name() not in blocks:
                names[follower.get_friendly_name()] = block
    return names


def _mean_times(
    compiled: ov.CompiledModel, feed: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, float]:
    """Mean microseconds of every executed layer, without the first runs.

    A plugin's counter is the mean of all runs since compilation, so the warm-up has to be taken out of it.
    """
    request = compiled.create_infer_request()

    def mean_after(runs: int) -> dict[str, float]:
        for number in range(runs):
            request.infer(feed[number % len(feed)], share_inputs=True)
        return {e.node_name: e.real_time.total_seconds() * 1e6 for e in request.get_profiling_info()}

    early, late = mean_after(_SETTLING_RUNS), mean_after(_PROFILED_RUNS)
    total = _SETTLING_RUNS + _PROFILED_RUNS
    return {
        name: max((total * value - _SETTLING_RUNS * early.get(name, 0.0)) / _PROFILED_RUNS, 0.0)
        for name, value in late.items()
    }


def _origins(compiled: ov.CompiledModel) -> dict[str, list[str]]:
    """Executed layer -> names of IR layers it stands for; inserted layers stand for the one they feed."""
    graph = compiled.get_runtime_model()
    names = {
        node.get_friendly_name(): [
            n for n in _text(node.get_rt_info(), "originalLayersNames").split(",") if n
        ]
        for node in graph.get_ordered_ops()
    }
    for node in graph.get_ordered_ops():
        if names[node.get_friendly_name()]:
            continue
        fed = [
            edge.get_node().get_friendly_name() for out in node.outputs() for edge in out.get_target_inputs()
        ]
        names[node.get_friendly_name()] = next((names[name] for name in fed if names.get(name)), [])
    return names


def _text(info: Any, key: str) -> str:
    try:
        return str(info[key].astype(str))
    except (KeyError, RuntimeError, AttributeError):
        return str(info[key]) if key in info else ""
