"""What is tuned, and the digest by which an earlier race of the same thing is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import openvino as ov

from vinoopt import serde
from vinoopt.bench import Sample
from vinoopt.records import DeviceSpec
from vinoopt.tuning.settings import Values
from vinoopt.tuning.trials import TuneConfig


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
    core = ov.Core()
    facts = {
        "model": _fingerprint(task.model),
        "reference": _fingerprint(task.reference) if task.reference is not None else None,
        "device": task.device,
        "name": core.get_property(task.device, "FULL_DEVICE_NAME") if _is_here(core, task.device) else "",
        "openvino": ov.get_version(),
        "space": space,
        "config": serde.to_json(serde.replace(config, seconds=None, batches=())),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_here(core: ov.Core, device: str) -> bool:
    return device in core.available_devices


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
