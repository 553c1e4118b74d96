"""vinoopt: the deployment compiler for Intel CPUs, iGPUs and NPUs.

Public names are resolved when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vinoopt._version import __version__

if TYPE_CHECKING:
    from vinoopt.bench import measure
    from vinoopt.bundle import Bundle, open_bundle
    from vinoopt.distillation.entry import distill
    from vinoopt.frontend.normalize import SourceModel, load_model
    from vinoopt.hardware.detect import detect_host
    from vinoopt.hardware.profile import load_profile
    from vinoopt.inspection import inspect_model
    from vinoopt.pipeline import compile, compress
    from vinoopt.records import AccuracyBudget, CompressionPlan, PreprocessSpec, Target
    from vinoopt.tuning import tune
    from vinoopt.verification import verify

_HOMES = {
    "compile": "vinoopt.pipeline",
    "compress": "vinoopt.pipeline",
    "distill": "vinoopt.distillation.entry",
    "inspect_model": "vinoopt.inspection",
    "measure": "vinoopt.bench",
    "tune": "vinoopt.tuning",
    "verify": "vinoopt.verification",
    "open_bundle": "vinoopt.bundle",
    "Bundle": "vinoopt.bundle",
    "load_model": "vinoopt.frontend.normalize",
    "SourceModel": "vinoopt.frontend.normalize",
    "load_profile": "vinoopt.hardware.profile",
    "detect_host": "vinoopt.hardware.detect",
    "AccuracyBudget": "vinoopt.records",
    "CompressionPlan": "vinoopt.records",
    "PreprocessSpec": "vinoopt.records",
    "Target": "vinoopt.records",
}

__all__ = [
    "AccuracyBudget",
    "Bundle",
    "CompressionPlan",
    "PreprocessSpec",
    "SourceModel",
    "Target",
    "__version__",
    "compile",
    "compress",
    "detect_host",
    "distill",
    "inspect_model",
    "load_model",
    "load_profile",
    "measure",
    "open_bundle",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vinoopt' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
