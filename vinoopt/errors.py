"""Every error that vinoopt raises on purpose, with the exit code that the command line gives for it.

::

    VinooptError                  1  ours: something went wrong that the caller could not have avoided
    ├── InputError                2  what the caller handed in cannot be used; the message says what to change
    │   ├── ModelError               the ONNX file, or a graph inside it
    │   │   └── UnsupportedModelError   readable, but holds something that cannot be deployed
    │   ├── ShapeError               a shape is missing, or contradicts the model
    │   ├── PreprocessError          the preprocessing asked for does not fit the model
    │   ├── DataError                samples or labels: wrong names, shapes, types, too few, not finite
    │   ├── MetricError              unknown metric, or one that does not fit these outputs
    │   ├── ProfileError             a hardware profile file: unknown name, key or value
    │   ├── TargetError              a target that the profile or this machine does not have
    │   ├── PlanError                a compression plan that does not fit the model
    │   ├── BundleError              the output folder: not a bundle, damaged, or in the way
    │   └── ExtraMissing             an optional package that was asked for is not installed
    ├── CompressionError          1  pruning or quantization failed on a model that looked fine
    │   └── DistillationError        the model cannot be trained; it is as it was
    ├── DeviceError               1  OpenVINO could not compile for, or run on, a device of this machine
    └── ToolchainError            1  an offline toolchain
        ├── ToolchainMissing         not installed; the message says how to get it
        ├── ToolchainCrashed         died; says nothing about the model
        ├── ToolchainTimeout         ran out of its time limit; says nothing about the model
        └── ToolchainRefused         the vendor's compiler looked at the model and said no

Exit code 3 (budget not met) and 130 (interrupted) are outcomes of a run that still wrote a bundle, not errors.
Errors of third parties become ours at the single place that calls them; bugs pass through untouched.
"""

from __future__ import annotations


class VinooptError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code: int = 1


class InputError(VinooptError):
    """What the caller handed in cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """The ONNX file cannot be read or is not valid."""


class UnsupportedModelError(ModelError):
    """The model is valid ONNX, but holds something that cannot be deployed with OpenVINO."""


class ShapeError(InputError):
    """A shape is missing, or contradicts the model."""


class PreprocessError(InputError):
    """The preprocessing that was asked for does not fit the model."""


class DataError(InputError):
    """Samples or labels cannot be used."""


class MetricError(InputError):
    """The metric is unknown, or does not fit the model's outputs."""


class ProfileError(InputError):
    """A hardware profile file is unknown or malformed."""


class TargetError(InputError):
    """The target does not exist in its profile, or on this machine."""


class PlanError(InputError):
    """A compression plan does not fit the model."""


class BundleError(InputError):
    """The output folder is not a bundle, is damaged, or is in the way."""


class ExtraMissing(InputError):  # noqa: N818 - reads as the state it reports
    """An optional package that was asked for is not installed; the message says how to get it."""


class CompressionError(VinooptError):
    """Pruning or quantization failed on a model that looked fine."""


class DistillationError(CompressionError):
    """A compressed model cannot be trained; it is left as it was."""


class DeviceError(VinooptError):
    """OpenVINO could not compile for, or run on, a device of this machine."""


class ToolchainError(VinooptError):
    """An offline toolchain did not deliver."""


class ToolchainMissing(ToolchainError):  # noqa: N818 - reads as the state it reports
    """The toolchain is not installed here."""


class ToolchainCrashed(ToolchainError):  # noqa: N818
    """The toolchain died; that says nothing about the model."""


class ToolchainTimeout(ToolchainError):  # noqa: N818
    """The toolchain ran out of its time limit; that says nothing about the model."""


class ToolchainRefused(ToolchainError):  # noqa: N818
    """The vendor's compiler looked at the model and refused it."""
