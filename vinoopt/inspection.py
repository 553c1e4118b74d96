"""What is in an ONNX model, and what can be done with it: nothing is compiled or run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import openvino as ov

from vinoopt.compression.folding import find_branches
from vinoopt.compression.groups import find_groups
from vinoopt.compression.scope import resolve_ignored
from vinoopt.frontend.normalize import load_model
from vinoopt.records import PreprocessSpec, PruningGroup, Record, TensorSpec


class Inspection(Record):
    """An ONNX model after normalization."""

    model: str
    sha256: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    """OpenVINO operator type -> count, without constants."""
    parameters: int
    """Elements of all constants."""
    quantized: str
    """Why it counts as already quantized; empty where it does not."""
    is_transformer: bool
    groups: tuple[PruningGroup, ...]
    """Groups of channels that can be pruned."""
    blocked: tuple[PruningGroup, ...]
    """Groups that cannot, with the reason."""
    stand_ins: dict[str, tuple[int, ...]]
    """Last layer of a residual branch that one layer may stand for -> windows of that layer worth trying."""
    frozen: dict[str, str]
    """Layer -> why it freezes what it touches."""
    messages: tuple[str, ...]


def inspect_model(
    path: str | Path,
    *,
    shape: str | None = None,
    preprocess: Sequence[PreprocessSpec] = (),
    ignored_scope: Sequence[str] = (),
) -> Inspection:
    """The facts about an ONNX file; raises what `load_model` raises, and `PlanError` for the ignored scope."""
    source = load_model(path, shape=shape, preprocess=preprocess)
    coupling = find_groups(source.model, ignored=resolve_ignored(source.model, ignored_scope))
    kinds = Counter(node.get_type_name() for node in source.model.get_ops())
    return Inspection(
        model=str(path),
        sha256=source.sha256,
        opset=source.onnx.opset,
        inputs=source.inputs,
        outputs=source.outputs,
        operators={kind: count for kind, count in kinds.most_common() if kind != "Constant"},
        parameters=_parameters(source.model),
        quantized=source.quantized,
        is_transformer=source.is_transformer,
        groups=coupling.groups,
        blocked=coupling.blocked,
        stand_ins={b.end: b.kernels for b in find_branches(source.model, coupling)},
        frozen={layer.name: layer.reason for layer in coupling.frozen},
        messages=source.messages,
    )


def _parameters(model: ov.Model) -> int:
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(math.prod(map(int, node.get_shape())) for node in constants)
