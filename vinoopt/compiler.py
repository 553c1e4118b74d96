"""Which yardstick a target gets: measured where it is this machine or a worker, else emulated or modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import openvino as ov

from vinoopt.errors import TargetError
from vinoopt.fleet import Line
from vinoopt.hardware.profile import HOST
from vinoopt.lab import Lab, needs_of
from vinoopt.records import Device, DeviceSpec, Target
from vinoopt.toolchains.host import HostToolchain
from vinoopt.yardsticks import (
    EmulatedCpuYardstick,
    HostYardstick,
    ModelledGpuYardstick,
    NpuYardstick,
    Sample,
    TargetYardstick,
)

_ABSENT: dict[Device, Callable[..., Any]] = {
    Device.CPU: EmulatedCpuYardstick,
    Device.GPU: ModelledGpuYardstick,
    Device.NPU: NpuYardstick,
}

def yardstick_for(
    target: Target,
    spec: DeviceSpec,
    *,
    reference: ov.Model,
    samples: Sequence[Sample],
    seconds: float = 4.0,
    line: Line | None = None,
) -> TargetYardstick:
    """How candidates are timed and run for a target; `seconds` are for each contestant of a final comparison.

    Only the profile `host` is this machine: a device of the same kind here is not the product that another
    profile names. Where a worker at the other end of `line` announces that product, everything is measured there.
    Raises `TargetError` where OpenVINO does not list the host's device, or a profile lacks the
    figures that its cost model needs, and `ToolchainMissing`, with how to get it, where candidates could not be
    timed at all.
    """
    if line is not None and target.profile != HOST and line.serves(needs_of(target)):
        lab = Lab(line=line, target=target)
        return HostYardstick(
            target=target, spec=spec, reference=reference, samples=samples, seconds=seconds, place=lab
        )
    if target.profile != HOST:
        yardstick = _ABSENT[spec.kind](target=target, spec=spec, reference=reference, samples=samples)
        if isinstance(yardstick, EmulatedCpuYardstick):
            yardstick.seconds_each = seconds
        yardstick.require()
        found: TargetYardstick = yardstick
        return found
    availability = HostToolchain().probe(spec)
    if not availability.ok:
        raise TargetError(f'target "{target}": {availability.reason}; {availability.fix}')
    return HostYardstick(target=target, spec=spec, reference=reference, samples=samples, seconds=seconds)
