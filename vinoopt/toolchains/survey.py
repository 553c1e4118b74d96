"""Which devices are here, for which others this machine can compile, and what is missing for the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vinoopt.hardware.detect import fingerprint, match_host
from vinoopt.hardware.profile import list_profiles
from vinoopt.records import (
    Availability,
    CpuOffline,
    Device,
    DeviceSpec,
    GpuOffline,
    HostFingerprint,
    NpuOffline,
    Record,
)
from vinoopt.toolchains import Toolchain
from vinoopt.toolchains.cpu_isa import CpuIsaToolchain
from vinoopt.toolchains.gpu import GpuToolchain
from vinoopt.toolchains.npu import NpuToolchain

_AT_ONCE = 4
"""Children that are asked at a time; they wait more than they compute."""


class Reach(Record):
    """Whether candidates can be judged here for the devices of some profiles, and by what."""

    kind: Device
    what: str
    """What the devices have in common, as `AVX2`, `Xe-LP 12.2, adls 1x2x16 0x4680`, `platform 4000`."""
    profiles: tuple[str, ...]
    availability: Availability
    routes: tuple[Availability, ...] = ()
    """Of an NPU: every way to its compiler, in the order in which they are tried."""


class Survey(Record):
    """What `vinoopt doctor` says."""

    host: HostFingerprint
    matched_profile: str | None
    """The shipped profile that this machine's CPU belongs to."""
    reach: tuple[Reach, ...]

    @property
    def missing(self) -> tuple[Reach, ...]:
        """What cannot be judged here."""
        return tuple(each for each in self.reach if not each.availability.ok)


def survey() -> Survey:
    """The state of this machine; drivers are asked in children, which takes some seconds."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reach = tuple(pool.map(_reach, alike()))
    return Survey(host=fingerprint(), matched_profile=match_host(), reach=reach)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Devices of the shipped profiles that stand or fall together: a toolchain is asked the same for all."""

    kind: Device
    what: str
    generation: str
    """What several groups may have in common, as `Xe-LP 12.2`."""
    members: dict[str, DeviceSpec]
    """Profile -> device."""


def _reach(group: Group) -> Reach:
    spec = next(iter(group.members.values()))
    npu = NpuToolchain()
    toolchains: dict[Device, Toolchain] = {
        Device.CPU: CpuIsaToolchain(),
        Device.GPU: GpuToolchain(),
        Device.NPU: npu,
    }
    return Reach(
        kind=group.kind,
        what=group.what,
        profiles=tuple(group.members),
        availability=toolchains[group.kind].probe(spec),
        routes=npu.routes(spec) if group.kind is Device.NPU else (),
    )


def alike() -> list[Group]:
    """The devices of all shipped profiles, grouped by what decides whether this machine can serve them."""
    found: dict[tuple[Device, str], dict[str, DeviceSpec]] = {}
    for kind in Device:
        for profile in list_profiles():
            spec = profile.devices.get(kind)
            if spec is not None and spec.last_openvino is None:
                found.setdefault((kind, _question(spec)), {})[profile.name] = spec
    return [
        Group(kind=kind, what=what, generation=_generation(next(iter(members.values()))), members=members)
        for (kind, what), members in found.items()
    ]


def _question(spec: DeviceSpec) -> str:
    """Everything that a toolchain is asked for: of two GPUs of a generation a driver may serve only one."""
    if isinstance(spec.offline, GpuOffline):
        families = "/".join(spec.offline.families)
        return f"{_generation(spec)}, {families} {spec.offline.hardware} {spec.offline.device_id}"
    return _generation(spec)


def _generation(spec: DeviceSpec) -> str:
    offline = spec.offline
    if isinstance(offline, CpuOffline):
        return offline.isa_cap
    if isinstance(offline, GpuOffline):
        return f"{spec.architecture} {offline.architecture}"
    if isinstance(offline, NpuOffline):
        return f"platform {offline.platform}"
    return spec.architecture
