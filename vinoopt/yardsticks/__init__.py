"""What each kind of target does with a candidate: measured where it is here, emulated or modelled where not."""

from vinoopt.yardsticks.base import Entry, Sample, SideBySide, TargetYardstick, runtime_properties
from vinoopt.yardsticks.emulated_cpu import EmulatedCpuYardstick
from vinoopt.yardsticks.here import HostYardstick
from vinoopt.yardsticks.modelled_gpu import ModelledGpuYardstick
from vinoopt.yardsticks.npu import NpuYardstick
from vinoopt.yardsticks.places import Here, Place

__all__ = [
    "EmulatedCpuYardstick",
    "Entry",
    "Here",
    "HostYardstick",
    "ModelledGpuYardstick",
    "NpuYardstick",
    "Place",
    "Sample",
    "SideBySide",
    "TargetYardstick",
    "runtime_properties",
]
