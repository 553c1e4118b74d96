"""Why OpenVINO cannot read a model, in one sentence that names the node."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from vinoopt.errors import ModelError, UnsupportedModelError
from vinoopt.frontend.load import DEFAULT_DOMAINS, describe, walk_nodes

_Found = tuple[onnx.NodeProto, tuple[onnx.NodeProto, ...]]

_MISSING = re.compile(r"No conversion rule found for operations: (?P<ops>.+)")
_FAILED_NODE = re.compile(r"<Node\((?P<op>[^)]*)\): (?P<name>.*?)>'")
_FAILED_OPS = re.compile(r"Conversion is failed for: (?P<ops>.+)")
_VERSION = re.compile(r"-\d+$")
"""OpenVINO writes `Bernoulli-22` for an operator of the default domain."""
_NOISE = re.compile(
    r"^(Exception from|Check '|While validating|FrontEnd API failed|Loading input model|Model wasn't|Summary:"
    r"|Conversion is failed|No conversion|Conversion failed|Failed operations)"
)
_SHOWN = 3


def explain(path: Path, proto: onnx.ModelProto, *, reason: str, complaint: str) -> ModelError:
    """The error to raise for a model that `core.read_model` refused with `reason`.

    `complaint` is what onnx.checker said; a file that breaks ONNX's own rules is a `ModelError`, a valid one
    that OpenVINO cannot read an `UnsupportedModelError`.
    """
    nodes = list(walk_nodes(proto))
    missing = _without_rule(reason, nodes)
    if missing:
        return UnsupportedModelError(f"{path}: {_missing_sentence(missing)}")
    told = cause(reason)
    failed = _failed_node(reason, nodes)
    if complaint:
        return ModelError(f"{path}: not valid ONNX: {complaint}; export the model again")
    if failed is not None:
        return UnsupportedModelError(f"{path}: {_failed_sentence(failed, told)}")
    return UnsupportedModelError(
        f"{path}: OpenVINO cannot read this model: {told}; export it again with another opset or fixed "
        "shapes (torch.onnx.export(..., dynamic_shapes=None))"
    )


def failed_nodes(proto: onnx.ModelProto, reason: str) -> list[onnx.NodeProto]:
    """The nodes whose operators `core.read_model` names in its refusal."""
    nodes = list(walk_nodes(proto))
    found = [node for node, _ in _without_rule(reason, nodes)]
    failed = _failed_node(reason, nodes)
    return found if failed is None else [*found, failed[0]]


def _without_rule(reason: str, nodes: list[_Found]) -> list[_Found]:
    match = _MISSING.search(reason)
    if match is None:
        return []
    words = {_VERSION.sub("", word.strip()) for word in match["ops"].split(",")}
    return [found for found in nodes if _spellings(found[0]) & words]


def _spellings(node: onnx.NodeProto) -> set[str]:
    domain = "" if node.domain in DEFAULT_DOMAINS else f"{node.domain}."
    return {f"{domain}{node.op_type}", f"{node.domain}.{node.op_type}"}


def _missing_sentence(missing: list[_Found]) -> str:
    first: dict[tuple[str, str], _Found] = {}
    for found in missing:
        first.setdefault((found[0].domain, found[0].op_type), found)
    shown = "; ".join(_place(*found) for found in list(first.values())[:_SHOWN])
    more = f" and {len(first) - _SHOWN} more operators" if len(first) > _SHOWN else ""
    custom = any(found[0].domain not in DEFAULT_DOMAINS for found in first.values())
    fix = (
        "export the model with standard ONNX operators instead, or cut it off with onnx.utils.extract_model"
        if custom
        else "export with a newer opset, or cut it off with onnx.utils.extract_model"
    )
    return f"OpenVINO has no operator for {shown}{more}; {fix}"


def _failed_node(reason: str, nodes: list[_Found]) -> _Found | None:
    """The innermost node that the text names: by name or output, else the first of a failed operator."""
    for match in reversed(list(_FAILED_NODE.finditer(reason))):
        for found in nodes:
            if match["name"] == found[0].name or match["name"] in found[0].output:
                return found
    summary = _FAILED_OPS.search(reason)
    if summary is None:
        return None
    words = {_VERSION.sub("", word.strip()) for word in summary["ops"].split(",")}
    return next((found for found in nodes if _spellings(found[0]) & words), None)


def _failed_sentence(found: _Found, told: str) -> str:
    _, outer = found
    fix = "export it again with another opset or with fixed shapes"
    if outer:
        fix = (
            f"export the model without {outer[0].op_type} (trace one branch, or give the value that decides "
            "it as a constant)"
        )
    return f"OpenVINO cannot convert {_place(*found)}: {told}; {fix}"


def _place(node: onnx.NodeProto, outer: tuple[onnx.NodeProto, ...]) -> str:
    return describe(node) + "".join(f" inside {describe(each)}" for each in reversed(outer))


def cause(reason: str) -> str:
    """The last line of the text that says something in words."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    told = [
        line for line in lines if not _NOISE.match(line.removeprefix("-- ")) and "with a message" not in line
    ]
    return (told or lines or ["no reason given"])[-1].rstrip(".")
