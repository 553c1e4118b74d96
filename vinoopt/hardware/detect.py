"""What this machine has: a profile of its devices, and the fingerprint that figures are kept with."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

import openvino as ov
import psutil

from vinoopt._version import __version__
from vinoopt.errors import DeviceError
from vinoopt.hardware import isa
from vinoopt.hardware.profile import HOST, list_profiles
from vinoopt.records import (
    Device,
    DeviceSpec,
    Figure,
    HardwareProfile,
    HostFingerprint,
    Precision,
)

_CPUINFO = Path("/proc/cpuinfo")
_CONTROL_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CAN_BE_DROPPED = ("inactive_file", "active_file", "slab_reclaimable")
_PACKAGES = ("openvino", "nncf", "onnx", "numpy")
_GPU_CHANNELS = {False: 16, True: 32}
"""Has XMX -> channels of one block of OpenVINO's GPU layouts (`b_fs_yx_fsv16`), or of one int8 XMX step."""
_NPU_CHANNELS = 16
_NOTE_NO_FLAGS = "this system does not list the CPU's flags: its instruction set was taken from its name"
_CAPTURE_VARIABLE = "SetCommandStreamReceiver"


def detect_host() -> HardwareProfile:
    """This machine as a profile named `host`: the CPU, and each GPU or NPU that OpenVINO lists.

    Raises `DeviceError` where OpenVINO cannot even describe the CPU.
    """
    core = ov.Core()
    flags = cpu_flags()
    devices = {Device.CPU: _cpu_spec(core, flags)}
    listed = {name.split(".")[0] for name in core.available_devices}
    if "GPU" in listed and not _is_capturing():
        devices[Device.GPU] = _gpu_spec(core)
    if "NPU" in listed:
        devices[Device.NPU] = _npu_spec(core)
    return HardwareProfile(
        name=HOST,
        title=f"this machine ({devices[Device.CPU].name})",
        family=match_host() or "unknown",
        sources=("detected through OpenVINO and the operating system",),
        devices=devices,
        notes=() if flags else (_NOTE_NO_FLAGS,),
    )


def fingerprint() -> HostFingerprint:
    """The machine and software that figures are measured on."""
    core = ov.Core()
    return HostFingerprint(
        cpu=_property(core, "CPU", "FULL_DEVICE_NAME"),
        cores=_cores(),
        memory_bytes=psutil.virtual_memory().total,
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={**{name: _version(name) for name in _PACKAGES}, "vinoopt": __version__},
        devices={name: _property(core, name, "FULL_DEVICE_NAME") for name in core.available_devices},
    )


def free_bytes(groups: Path = _CONTROL_GROUPS, own: Path = _OWN_GROUP) -> int:
    """Memory that can still be taken on this machine, and in the control groups (v2) that this process runs in."""
    free = int(psutil.virtual_memory().available)
    try:
        paths = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    except OSError:  # another system
        return free
    for path in paths:
        place = groups / path
        for group in (place, *place.parents):
            if group.is_relative_to(groups):
                free = min(free, _free_in(group, free))
    return max(free, 0)


def _free_in(group: Path, otherwise: int) -> int:
    """What the limit of a control group leaves, caches that can be dropped not counted as used."""
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # a group without limits
        return otherwise
    if not limit.isdigit():
        return otherwise
    return int(limit) - int(used) + sum(int(held.get(name, 0)) for name in _CAN_BE_DROPPED)


def match_host() -> str | None:
    """The shipped profile that this machine's CPU belongs to, or None."""
    return match_cpu(_property(ov.Core(), "CPU", "FULL_DEVICE_NAME"))


def match_cpu(brand: str) -> str | None:
    """The first shipped profile one of whose `cpu_match` patterns is found in a CPU's brand text, or None."""
    plain = re.sub(r"\((R|TM)\)", "", brand, flags=re.IGNORECASE)
    for profile in list_profiles():
        if any(re.search(pattern, plain, re.IGNORECASE) for pattern in profile.cpu_match):
            return profile.name
    return None


@cache
def cpu_flags() -> frozenset[str]:
    """The flags that `/proc/cpuinfo` lists for the first CPU; empty on systems without it."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


# --------------------------------------------------------------------------- devices


def _cpu_spec(core: ov.Core, flags: frozenset[str]) -> DeviceSpec:
    name = _property(core, "CPU", "FULL_DEVICE_NAME")
    level = isa.strongest(flags) or _level_of_match(name)
    has_bf16 = "BF16" in _capabilities(core, "CPU")
    precisions = [
        *([Precision.INT8] if level is not None and level.has_vnni else []),
        *([Precision.BF16] if has_bf16 else []),
        *([Precision.F16] if level is not None and level.has_f16 else []),
        Precision.F32,
    ]
    return DeviceSpec(
        kind=Device.CPU,
        name=name,
        architecture=level.cap if level is not None else platform.machine(),
        precisions=tuple(precisions),
        channel_multiple=level.channel_multiple if level is not None else 8,
        cores=_cores(),
        memory_bytes=Figure(value=psutil.virtual_memory().total, source="operating system"),
        offline=None,
    )


def _level_of_match(brand: str) -> isa.Isa | None:
    """What a shipped profile knows about this CPU's instruction set, for systems that list no flags."""
    matched = match_cpu(brand)
    for profile in list_profiles():
        spec = profile.devices.get(Device.CPU)
        if profile.name == matched and spec is not None:
            return isa.isa_of(spec)
    return None


def _gpu_spec(core: ov.Core) -> DeviceSpec:
    capabilities = _capabilities(core, "GPU")
    has_xmx = "GPU_HW_MATMUL" in capabilities
    precisions = [
        *([Precision.INT8] if "INT8" in capabilities else []),
        *([Precision.F16] if "FP16" in capabilities else []),
        Precision.F32,
    ]
    return DeviceSpec(
        kind=Device.GPU,
        name=_property(core, "GPU", "FULL_DEVICE_NAME"),
        architecture=_property(core, "GPU", "DEVICE_ARCHITECTURE"),
        precisions=tuple(precisions),
        channel_multiple=_GPU_CHANNELS[has_xmx],
        cores=int(_property(core, "GPU", "GPU_EXECUTION_UNITS_COUNT")),
        memory_bytes=Figure(
            value=float(_property(core, "GPU", "GPU_DEVICE_TOTAL_MEM_SIZE")), source="reported by OpenVINO"
        ),
    )


def _npu_spec(core: ov.Core) -> DeviceSpec:
    return DeviceSpec(
        kind=Device.NPU,
        name=_property(core, "NPU", "FULL_DEVICE_NAME"),
        architecture=_property(core, "NPU", "DEVICE_ARCHITECTURE"),
        precisions=(Precision.INT8, Precision.F16),
        channel_multiple=_NPU_CHANNELS,
    )


def _is_capturing() -> bool:
    """Whether this process offers simulated GPUs, which are not devices of this machine."""
    return os.environ.get(_CAPTURE_VARIABLE, "0") not in ("", "0")


def _property(core: ov.Core, device: str, key: str) -> str:
    try:
        return str(core.get_property(device, key))
    except RuntimeError as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise DeviceError(f"OpenVINO cannot tell {key} of {device}: {reason}; update its driver") from exc


def _capabilities(core: ov.Core, device: str) -> frozenset[str]:
    try:
        return frozenset(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    except RuntimeError as exc:
        reason = str(exc).strip().splitlines()[-1]
        raise DeviceError(f"OpenVINO cannot tell what {device} can do: {reason}; update its driver") from exc


def _cores() -> int:
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
