"""Runs models on this host under another CPU's instruction set: oneDNN's cap, in a child process.

Numbers that come out are those of that instruction set, the saturation of INT8 sums on CPUs without VNNI
included, so accuracy counts. Cores, caches and clock stay this host's, so of times only ratios count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainMissing, ToolchainRefused
from vinoopt.hardware.detect import cpu_flags
from vinoopt.hardware.isa import ISAS, Isa
from vinoopt.records import (
    Availability,
    Build,
    CpuOffline,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    LayerReport,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.process import ChildReply, memory_limit, run_child
from vinoopt.toolchains.standing import StandingChildren

NAME = "oneDNN's instruction set cap"
WORKER = "vinoopt.toolchains.cpu_worker"

_CAP_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_MAC_TYPES = frozenset(
    {
        "Convolution",
        "Deconvolution",
        "FullyConnected",
        "MatMul",
        "RNNCell",
        "RNNSeq",
        "ScaledDotProductAttention",
    }
)
_WIDTHS = {"sse4": 128, "avx2": 256, "avx512": 512, "amx": 1024}
"""Part of a kernel's name -> bits of its registers; a row of AMX tiles counts as wider than AVX-512."""
_VECTOR = re.compile("|".join(_WIDTHS))
_CAP_WIDTHS = {"SSE": 128, "AVX2": 256, "AVX512": 512}
_INT8 = frozenset({"i8", "u8"})

_NO_PROPERTIES = RuntimeProperties()

Runner = Callable[..., ChildReply]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyJob:
    """Latencies of IR files, taken in interleaved rounds."""

    models: tuple[Path, ...]
    properties: tuple[RuntimeProperties, ...]
    """Each model's own."""
    rounds: int = 9
    round_ms: float = 15.0
    """A model has as many inferences per round as fit into it, at least one."""
    seconds: float | None = None
    """Where given, rounds end early once so much time has passed, but not before the fifth."""
    warmup: int = 5
    calls: Path | None = None
    """Inputs as `calls.write_calls` leaves them; None: one call of seeded noise, zeros for whole numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictJob:
    """Outputs of an IR file for the calls in `calls`, left in `outputs` in the same form."""

    model: Path
    calls: Path
    outputs: Path
    names: tuple[str, ...] = ()
    """Of the outputs, in the model's order; empty: the names in the IR."""
    properties: RuntimeProperties = _NO_PROPERTIES


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTimesJob:
    """Time per block of an IR file, as `host.layer_times` takes it from the plugin's own counters."""

    model: Path
    calls: Path
    blocks: tuple[str, ...]
    properties: RuntimeProperties = _NO_PROPERTIES


Job = LatencyJob | PredictJob | BlockTimesJob


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedRun:
    """What was seen under the cap; the evidence of all of it is `Evidence.EMULATED`."""

    isa_cap: str
    samples_ms: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """Model -> round -> inferences. Only ratios between models mean anything."""
    times_us: dict[str, float] = field(default_factory=dict)
    """Block -> microseconds. Only ratios between blocks mean anything."""
    calls: int = 0
    """Number of calls whose outputs were written."""
    layers: tuple[tuple[LayerReport, ...], ...] = ()
    """Per model."""
    diagnostics: tuple[Diagnostic, ...] = ()


class CpuIsaToolchain:
    """The toolchain for CPUs of a profile whose instruction set this host can run."""

    def __init__(self, *, flags: frozenset[str] | None = None, run: Runner | None = None) -> None:
        self._flags = cpu_flags() if flags is None else flags
        self._run: Runner = run or run_child
        self._predict: Runner = run or StandingChildren()

    def probe(self, spec: DeviceSpec) -> Availability:
        """Whether this host has every instruction of the device's cap."""
        try:
            isa = self._isa(spec)
        except ToolchainError as exc:
            fix = "run on a machine that has them; without it, accuracy on this CPU is not checked"
            return Availability(ok=False, name=NAME, reason=str(exc), fix=fix)
        return Availability(ok=True, name=NAME, version=isa.cap)

    def compile(
        self,
        model_path: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
    ) -> Build:
        """Kernel and precision of each layer under the cap; no blob, since a CPU compiles the IR itself.

        A model that compiles only without the cap gives a build of evidence `NOT_CHECKED` with the diagnostic
        `CPU_ISA_CAP_ARTEFACT`. Raises `ToolchainMissing` where this host lacks instructions,
        `ToolchainRefused` where the model does not compile without the cap either, `ToolchainCrashed`,
        `ToolchainTimeout`.
        """
        del output
        isa = self._isa(spec)
        used = _properties(isa, properties)
        request = {"op": "compile", "models": [str(model_path.resolve())], "properties": used.as_dict()}
        try:
            values = self._capped(isa, request, timeout_s)
        except _CapArtefact as exc:
            diagnostic = Diagnostic(severity="warning", code="CPU_ISA_CAP_ARTEFACT", message=str(exc))
            return self._build(spec, isa, used, Evidence.NOT_CHECKED, diagnostics=(diagnostic,))
        layers = tuple(LayerReport(**layer) for layer in values["layers"][0])
        found = (
            *_diagnostics(isa, (layers,)),
            *_layer_diagnostics(layers, is_quantized=values["is_quantized"]),
        )
        return self._build(spec, isa, used, Evidence.COMPILED, layers=layers, diagnostics=found)

    def run_capped(self, spec: DeviceSpec, job: Job, *, timeout_s: float) -> CappedRun:
        """The job done in a child under the device's cap.

        Below BF16 the float format is forced to f32, and without VNNI dynamic quantization is off: OpenVINO
        would decide both from this host's CPU. Raises as `compile`, and `ToolchainCrashed` with
        `CPU_ISA_CAP_ARTEFACT` in the message where the model compiles only without the cap.
        """
        isa = self._isa(spec)
        request = _request(job)
        if isinstance(job, LatencyJob):
            request["per_model"] = [_properties(isa, each).as_dict() for each in job.properties]
        else:
            request["properties"] = _properties(isa, job.properties).as_dict()
        values = self._capped(isa, request, timeout_s)
        layers = tuple(tuple(LayerReport(**layer) for layer in model) for model in values["layers"])
        return CappedRun(
            isa_cap=isa.cap,
            samples_ms=tuple(tuple(map(tuple, model)) for model in values.get("samples_ms", ())),
            times_us=values.get("times_us", {}),
            calls=values.get("count", 0),
            layers=layers,
            diagnostics=tuple(_diagnostics(isa, layers)),
        )

    def environment(self, spec: DeviceSpec) -> dict[str, str | None]:
        """What makes a process of this host compute as the device does; read once, when OpenVINO first compiles.

        Raises `ToolchainMissing` where this host lacks instructions.
        """
        return _environment(self._isa(spec).cap)

    def properties(self, spec: DeviceSpec, properties: RuntimeProperties) -> RuntimeProperties:
        """The properties with those that OpenVINO would else choose by this host's CPU; raises as `environment`."""
        return _properties(self._isa(spec), properties)

    def _isa(self, spec: DeviceSpec) -> Isa:
        if not isinstance(spec.offline, CpuOffline):
            raise ToolchainMissing(f"the profile of {spec.name} names no instruction set to emulate")
        isa = ISAS.get(spec.offline.isa_cap)
        if isa is None:
            raise ToolchainMissing(
                f'{spec.name}: "{spec.offline.isa_cap}" is not an instruction set of oneDNN'
            )
        lacking = sorted(isa.flags - self._flags)
        if lacking and isa.stand_in is not None and ISAS[isa.stand_in].flags <= self._flags:
            return ISAS[isa.stand_in]
        if lacking:
            raise ToolchainMissing(
                f"CPU_ISA_NOT_ON_HOST: {spec.name} needs {isa.cap}, and this CPU lacks {', '.join(lacking)}"
            )
        return isa

    def _capped(self, isa: Isa, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        # Times are taken in a fresh process, whose memory no other model has shaped; outputs need none.
        run = self._predict if request["op"] == "predict" else self._run
        limits = {"timeout_s": timeout_s, "memory_limit_bytes": memory_limit()}
        reply = run(WORKER, request=request, env=_environment(isa.cap), **limits)
        if "compile_error" in reply.values:
            self._judge(isa, request, timeout_s, str(reply.values["compile_error"]))
        _check_effect(isa, reply.values["layers"])
        return reply.values

    def _judge(self, isa: Isa, request: dict[str, Any], timeout_s: float, error: str) -> NoReturn:
        """Raises `ToolchainRefused` where a model does not compile without the cap either, else `_CapArtefact`."""
        given = request.get("per_model") or [request["properties"]]
        for model, properties in zip(request["models"], given, strict=True):
            bare = {"op": "compile", "models": [model], "properties": properties}
            limits = {"timeout_s": timeout_s, "memory_limit_bytes": memory_limit()}
            reply = self._run(WORKER, request=bare, env=_environment(None), **limits)
            if "compile_error" in reply.values:
                raise ToolchainRefused(str(reply.values["compile_error"]))
        raise _CapArtefact(
            f"CPU_ISA_CAP_ARTEFACT: compiles on this host, but not under {isa.cap}, so that CPU cannot be "
            f"emulated for this model; that proves nothing about the CPU itself ({error})"
        )

    def _build(
        self,
        spec: DeviceSpec,
        isa: Isa,
        properties: RuntimeProperties,
        evidence: Evidence,
        *,
        layers: tuple[LayerReport, ...] = (),
        diagnostics: tuple[Diagnostic, ...] = (),
    ) -> Build:
        mac = [layer for layer in layers if layer.type in _MAC_TYPES]
        return Build(
            target=Target(profile=spec.name, device=Device.CPU),
            toolchain=f"openvino CPU under {isa.cap}",
            evidence=evidence,
            properties=properties,
            layers=layers,
            diagnostics=diagnostics,
            details={
                "isa_cap": isa.cap,
                "mac_layers": str(len(mac)),
                "mac_layers_int8": str(sum(layer.precision.lower() in _INT8 for layer in mac)),
                "mac_layers_reference": str(sum(_is_reference(layer) for layer in mac)),
            },
        )


class _CapArtefact(ToolchainCrashed):
    """A model that compiles on this host, but not under the cap."""


def _environment(cap: str | None) -> dict[str, str | None]:
    return dict.fromkeys(_CAP_VARIABLES, cap)


def _request(job: Job) -> dict[str, Any]:
    if isinstance(job, PredictJob):
        outputs = {"outputs": str(job.outputs.resolve()), "names": list(job.names)}
        return {**_files("predict", job.model, job.calls), **outputs}
    if isinstance(job, BlockTimesJob):
        return {**_files("block_times", job.model, job.calls), "blocks": list(job.blocks)}
    return {
        "op": "latency",
        "models": [str(model.resolve()) for model in job.models],
        "rounds": job.rounds,
        "round_ms": job.round_ms,
        "seconds": job.seconds,
        "warmup": job.warmup,
        "calls": None if job.calls is None else str(job.calls.resolve()),
    }


def _files(operation: str, model: Path, calls: Path) -> dict[str, Any]:
    return {"op": operation, "models": [str(model.resolve())], "calls": str(calls.resolve())}


def _properties(isa: Isa, properties: RuntimeProperties) -> RuntimeProperties:
    forced: dict[str, str] = {}
    if not isa.has_bf16:
        forced["INFERENCE_PRECISION_HINT"] = "f32"
    if not isa.has_vnni:
        forced["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    return RuntimeProperties.of({**properties.as_dict(), **forced})


# --------------------------------------------------------------------------- what the kernels say


def _check_effect(isa: Isa, models: list[list[dict[str, Any]]]) -> None:
    """Raises `ToolchainMissing` where a layer of oneDNN runs wider than the cap: then nothing was emulated."""
    allowed = _cap_width(isa)
    for layers in models:
        for layer in layers:
            found = _VECTOR.search(layer["kernel"])
            if layer["type"] in _MAC_TYPES and found is not None and _WIDTHS[found[0]] > allowed:
                raise ToolchainMissing(
                    f"this OpenVINO does not obey the cap {isa.cap}: {layer['name']} runs {layer['kernel']}"
                )


def _cap_width(isa: Isa) -> int:
    if "AMX" in isa.cap:
        return _WIDTHS["amx"]
    return next(width for start, width in _CAP_WIDTHS.items() if isa.cap.startswith(start))


def _diagnostics(isa: Isa, models: tuple[tuple[LayerReport, ...], ...]) -> Iterator[Diagnostic]:
    # MLAS chooses its kernels from the CPU itself and knows no cap.
    free = [layer for layers in models for layer in layers if "mlas" in layer.kernel]
    if free and _cap_width(isa) < _WIDTHS["avx512"]:
        yield Diagnostic(
            severity="warning",
            code="CPU_ISA_NOT_CAPPED",
            message=f"{len(free)} float layers run on MLAS, which ignores the cap and uses all of this host's "
            f"instructions: their times flatter float under {isa.cap}",
        )


def _layer_diagnostics(layers: tuple[LayerReport, ...], *, is_quantized: bool) -> Iterator[Diagnostic]:
    mac = [layer for layer in layers if layer.type in _MAC_TYPES]
    in_float = [layer for layer in mac if layer.precision.lower() not in _INT8] if is_quantized else []
    if in_float and len(in_float) == len(mac):
        message = f"the model is quantized, but none of its {len(mac)} layers with products runs in INT8"
        yield Diagnostic(severity="warning", code="CPU_NO_INT8_LAYER", message=message)
        in_float = []
    for layer in in_float:
        message = f"left in {layer.precision} ({layer.kernel}) although the model is quantized"
        yield Diagnostic(severity="warning", code="CPU_FLOAT_LAYER", message=message, layer=layer.name)
    for layer in filter(_is_reference, mac):
        message = f"runs on a reference kernel ({layer.kernel}), which is slow"
        yield Diagnostic(severity="warning", code="CPU_REFERENCE_KERNEL", message=message, layer=layer.name)


def _is_reference(layer: LayerReport) -> bool:
    return layer.kernel.startswith("ref_") or "_ref_" in layer.kernel
