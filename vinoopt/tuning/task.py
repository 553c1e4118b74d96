"""What is tuned, and the digest by which an earlier race of the same thing is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import psutil

from vinoopt import serde
from vinoopt.bench import Sample
from vinoopt.records import DeviceSpec
from vinoopt.tuning.settings import Values
from vinoopt.tuning.trials import TuneConfig

_VERSIONS = ("DRIVER_VERSION", "COMPILER_VERSION")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TuneTask:
    """The model, where it runs, and what its outputs are held against."""

    model: ov.Model
    samples: Sequence[Sample]
    device: str = "CPU"
    spec: DeviceSpec | None = None
    """Adds the hardware profile's values worth trying."""
    reference: ov.Model | None = None
    """The float model; None: `model` itself, computed in f32."""


def digest_of(task: TuneTask, config: TuneConfig, space: Mapping[str, Values]) -> str:
    """Digest of all that decides whether a setting leaves the race."""
    facts = {
        "model": _fingerprint(task.model),
        "reference": _fingerprint(task.reference) if task.reference is not None else None,
        "samples": samples_digest(task.samples),
        "device": task.device,
        "machine": _machine(task.device),
        "openvino": ov.get_version(),
        "space": space,
        "config": serde.to_json(serde.replace(config, seconds=None, batches=())),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _machine(device: str) -> dict[str, str]:
    """The device's name, its driver and compiler where it tells them, and the cores that may be used."""
    core = ov.Core()
    try:
        told = core.get_property(device, "SUPPORTED_PROPERTIES")
        names = [key for key in told if key == "FULL_DEVICE_NAME" or key.endswith(_VERSIONS)]
        facts = {key: str(core.get_property(device, key)) for key in sorted(names)}
    except RuntimeError:  # not here, or one that stands for several
        facts = {}
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return {**facts, "cores": str(cores)}


def samples_digest(samples: Iterable[Sample]) -> str:
    """Digest of names, shapes, types and values."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(json.dumps([name, np.shape(array), str(np.asarray(array).dtype)]).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fingerprint(model: ov.Model) -> str:
    """Digest of the operators, their shapes and the constants, in the order of execution."""
    digest = hashlib.sha256()
    for op in model.get_ordered_ops():
        shapes = [str(port.get_partial_shape()) for port in op.outputs()]
        sources = [port.get_source_output().get_node().get_type_name() for port in op.inputs()]
        digest.update(json.dumps([op.get_type_name(), shapes, sources, str(op.get_attributes())]).encode())
        if op.get_type_name() == "Constant":
            digest.update(_constant_bytes(op))
    return digest.hexdigest()


def _constant_bytes(op: ov.Node) -> bytes:
    if op.get_element_type() == ov.Type.string:
        return json.dumps([str(each) for each in op.get_value_strings()]).encode()
    return bytes(op.get_tensor_view().data.tobytes())
