"""What makes code for a target: devices that are here, and vendor compilers for those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from vinoopt.records import Availability, Build, DeviceSpec, RuntimeProperties


class Toolchain(Protocol):
    """Makes code for the devices of one kind."""

    def probe(self, spec: DeviceSpec) -> Availability:
        """Whether it can compile for the device here; if not, what is missing and how to get it."""
        ...

    def compile(
        self,
        model_path: Path,
        spec: DeviceSpec,
        *,
        properties: RuntimeProperties,
        output: Path,
        timeout_s: float,
    ) -> Build:
        """The IR at `model_path` compiled for the device, with a blob at `output` where one may be shipped.

        `Build.target` has the device's own name as profile: only the caller knows the profile's.

        Raises `ToolchainMissing`, `ToolchainCrashed`, `ToolchainTimeout` (these three say nothing about the
        model) or `ToolchainRefused` (the vendor's compiler said no).
        """
        ...
