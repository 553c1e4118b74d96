"""Compiles for Intel GPUs that are not here: their real driver in capture mode, in a child process.

The driver compiles every kernel as it would on the device, so layer kernels, precisions, refusals and memory
are those of the product. Kernels never run: there is no latency, no output and no blob. A driver that does
not know a product may offer another one without an error, hence the identity check of what it reports.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vinoopt.errors import ToolchainCrashed, ToolchainError, ToolchainMissing, ToolchainTimeout
from vinoopt.records import (
    Availability,
    Build,
    Device,
    DeviceSpec,
    Diagnostic,
    Evidence,
    GpuOffline,
    LayerReport,
    RuntimeProperties,
    Target,
)
from vinoopt.toolchains.process import ChildReply, memory_limit, run_child

NAME = "Intel OpenCL driver"
WORKER = "vinoopt.toolchains.gpu_worker"
VENDORS = Path("/etc/OpenCL/vendors")
IDENTIFY_TIMEOUT_S = 60.0

# Releases before this one report all of Gen12 as 12.0 and all of Gen9 as 9.0.
_EXACT_ARCHITECTURES = (23, 43)
_FIX = (
    "install it with `apt-get install intel-opencl-icd ocl-icd-libopencl1` (Debian 12: Gen9 to Alder Lake; "
    "Ubuntu 26.04: Tiger Lake to Panther Lake, with intel-opencl-icd-legacy also Gen9 and Gen11)"
)
_CAPTURE = {
    "NEOReadDebugKeys": "1",
    "SetCommandStreamReceiver": "1",  # capture of the command stream instead of hardware
    "UseAubStream": "0",  # distributions build the driver without that library, and it crashes without a word
    "UseBindlessMode": "0",  # else newer drivers abort for Meteor Lake and later
    "AUBDumpCaptureFileName": "/dev/null",
    "OCL_ICD_FILENAMES": None,
    "NEO_CACHE_PERSISTENT": "0",  # kernels that are compiled here must not meet a device
}
_MAC_TYPES = {
    "convolution",
    "deconvolution",
    "fullyconnected",
    "gemm",
    "matmul",
    "scaled_dot_product_attention",
    "lstm_seq",
    "gru_seq",
}
_INT8 = {"i8", "u8"}

Runner = Callable[..., ChildReply]
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """One driver and one of the names under which it may know the product."""

    icd: Path
    family: str

    def environment(self, offline: GpuOffline) -> dict[str, str | None]:
        return {
            **_CAPTURE,
            "OCL_ICD_VENDORS": str(self.icd),  # exactly one: two Intel drivers in a process crash
            "ProductFamilyOverride": self.family,
            "HardwareInfoOverride": offline.hardware,
            "ForceDeviceId": offline.device_id,
        }


class GpuToolchain:
    """The toolchain for GPUs of a profile that this machine lacks."""

    def __init__(self, *, vendors: Path = VENDORS, run: Runner = run_child) -> None:
        self._vendors = vendors
        self._run = run

    def probe(self, spec: DeviceSpec) -> Availability:
        """Whether an installed driver offers the device, with its own architecture and capabilities."""
        try:
            offline = _offline(spec)
            device = self._first(spec, offline, self._identify)
        except ToolchainError as exc:
            return Availability(ok=False, name=NAME, reason=str(exc), fix=_FIX)
        return Availability(ok=True, name=NAME, version=str(device["driver"]))

    def compile(
        self,
        model_path: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
    ) -> Build:
        """What the device's own compiler makes of the IR: kernel and precision per layer, memory, no blob.

        `output` stays unwritten. Raises `ToolchainMissing` where no installed driver serves the device,
        `ToolchainCrashed` and `ToolchainTimeout`, which say nothing about the model, and `ToolchainRefused`.
        """
        del output  # what could be exported holds weights that no kernel ever wrote
        offline = _offline(spec)

        def attempt(each: _Attempt, known: GpuOffline) -> Build:
            self._identify(each, known)
            request = {"model": str(model_path.resolve()), "properties": properties.as_dict()}
            reply = self._ask(request, each.environment(known), timeout_s)
            _check_identity(reply.values["device"], known)
            return _build(spec, each, reply.values, properties)

        return self._first(spec, offline, attempt)

    def _identify(self, attempt: _Attempt, offline: GpuOffline) -> dict[str, Any]:
        reply = self._ask({}, attempt.environment(offline), IDENTIFY_TIMEOUT_S)
        device: dict[str, Any] = reply.values["device"]
        _check_identity(device, offline)
        return device

    def _ask(self, request: dict[str, Any], env: dict[str, str | None], timeout_s: float) -> ChildReply:
        return self._run(
            WORKER, request=request, env=env, timeout_s=timeout_s, memory_limit_bytes=memory_limit()
        )

    def _first(self, spec: DeviceSpec, offline: GpuOffline, job: Callable[[_Attempt, GpuOffline], R]) -> R:
        """The result of the first driver and family name that serve the device."""
        failures: list[ToolchainError] = []
        for attempt in self._attempts(offline):
            try:
                return job(attempt, offline)
            except (ToolchainMissing, ToolchainCrashed) as exc:
                failures.append(exc)
            except ToolchainTimeout as exc:
                raise ToolchainTimeout(f"compiling for {spec.name} as {attempt.family}: {exc}") from exc
        if not failures:
            raise ToolchainMissing(f"no Intel OpenCL driver is registered in {self._vendors}")
        said = "; ".join(dict.fromkeys(str(exc) for exc in failures))
        crashes = [exc for exc in failures if isinstance(exc, ToolchainCrashed)]
        if crashes:
            raise ToolchainCrashed(f"compiling for {spec.name}: {said}") from crashes[-1]
        raise ToolchainMissing(f"{spec.name} is not served by the installed driver: {said}") from failures[-1]

    def _attempts(self, offline: GpuOffline) -> Iterator[_Attempt]:
        if sys.platform != "linux":
            raise ToolchainMissing(
                "compiling for a GPU that is not here needs Intel's OpenCL driver for Linux"
            )
        for icd in sorted(self._vendors.glob("*.icd")):
            if _names_intel(icd):
                yield from (_Attempt(icd=icd, family=family) for family in offline.families)


def _names_intel(icd: Path) -> bool:
    """Whether a registration is of Intel's driver; one that cannot be read, as a link into nothing, is of none."""
    try:
        return "igdrcl" in icd.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _offline(spec: DeviceSpec) -> GpuOffline:
    if not isinstance(spec.offline, GpuOffline):
        raise ToolchainMissing(
            f"no driver is known that compiles for {spec.name} without it; compile on a machine that has it"
        )
    return spec.offline


def _check_identity(device: dict[str, Any], offline: GpuOffline) -> None:
    """Raises `ToolchainMissing` where the driver is too old, or offers another device than was asked for."""
    release = _release(str(device["driver"]))
    if release < _release(offline.min_driver):
        raise ToolchainMissing(
            f"driver {device['driver']} is older than {offline.min_driver}, the first known to serve it"
        )
    wanted = offline.architecture
    if release < _EXACT_ARCHITECTURES:
        wanted = f"{wanted.partition('.')[0]}.0"
    differences = [
        f"{key.replace('_', ' ')} {device[key]} instead of {getattr(offline, key)}"
        for key in ("execution_units", "has_int8", "has_xmx")
        if device[key] != getattr(offline, key)
    ]
    if not _is_within(str(device["architecture"]), wanted):
        differences.append(f"architecture {device['architecture']} instead of {wanted}")
    if differences:
        raise ToolchainMissing(
            f"driver {device['driver']} offered another device, {device['name']}: {', '.join(differences)}"
        )


def _is_within(offered: str, wanted: str) -> bool:
    """Whether `12.70.4` is of architecture `12.70`, or of `12.7x`."""
    pattern = re.escape(wanted).replace("x", r"\d")
    return re.match(rf"{pattern}(\.|$)", offered) is not None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


# --------------------------------------------------------------------------- what became of the layers


def _build(
    spec: DeviceSpec, attempt: _Attempt, values: dict[str, Any], properties: RuntimeProperties
) -> Build:
    device = values["device"]
    layers = tuple(LayerReport(**layer) for layer in values["layers"])
    mac = [layer for layer in layers if has_products(layer)]
    in_int8 = [layer for layer in mac if layer.precision in _INT8]
    return Build(
        target=Target(profile=spec.name, device=Device.GPU),
        toolchain=f"openvino {device['openvino']} GPU, {NAME} {device['driver']} in capture mode",
        evidence=Evidence.COMPILED,
        properties=properties,
        memory_bytes=sum(values["memory"].values()),
        layers=layers,
        diagnostics=tuple(_diagnostics(spec, layers, mac, is_quantized=values["is_quantized"])),
        details={
            "driver": str(device["driver"]),
            "driver_family": attempt.family,
            "architecture": str(device["architecture"]),
            "mac_layers": str(len(mac)),
            "mac_layers_int8": str(len(in_int8)),
            "mac_layers_reference": str(sum(is_reference(layer) for layer in mac)),
            "compile_seconds_on_this_host": f"{values['seconds']:.2f}",
        },
    )


def _diagnostics(
    spec: DeviceSpec, layers: tuple[LayerReport, ...], mac: list[LayerReport], *, is_quantized: bool
) -> Iterator[Diagnostic]:
    left_in_float = [layer for layer in mac if layer.precision not in _INT8] if is_quantized else []
    has_int8 = isinstance(spec.offline, GpuOffline) and spec.offline.has_int8
    if left_in_float and not has_int8:
        yield Diagnostic(
            severity="warning",
            code="GPU_NO_INT8",
            message=f"{spec.name} has no INT8 arithmetic: {len(left_in_float)} of {len(mac)} layers run in "
            f"{_words({layer.precision for layer in left_in_float})}, with quantize layers on top; "
            "an f16 model is the better choice",
        )
    elif left_in_float and len(left_in_float) == len(mac):
        message = f"the model is quantized, but none of its {len(mac)} layers with products runs in INT8"
        yield Diagnostic(severity="warning", code="GPU_NO_INT8_LAYER", message=message)
    else:
        for layer in left_in_float:
            message = f"left in {layer.precision} ({layer.kernel}) although the model is quantized"
            yield Diagnostic(severity="warning", code="GPU_FLOAT_LAYER", message=message, layer=layer.name)
    for layer in filter(is_reference, mac):
        message = f"runs on a reference kernel ({layer.kernel}), which is slow"
        yield Diagnostic(severity="warning", code="GPU_REFERENCE_KERNEL", message=message, layer=layer.name)
    others = [layer for layer in layers if is_reference(layer) and layer not in mac]
    if others:
        message = f"{len(others)} layers without products run on reference kernels: " + _words(
            {layer.type for layer in others}
        )
        yield Diagnostic(severity="info", code="GPU_REFERENCE_KERNELS", message=message)


def has_products(layer: LayerReport) -> bool:
    """Whether an executed layer multiplies and adds."""
    return layer.type.lower() in _MAC_TYPES


def is_reference(layer: LayerReport) -> bool:
    """Whether a layer runs on a kernel that is written to be right, not fast."""
    return "_ref" in layer.kernel


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names))
