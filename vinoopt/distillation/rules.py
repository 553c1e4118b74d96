"""One rule per OpenVINO operator: what it does, said in PyTorch.

A rule takes the node and gives the function of its input tensors. It reads attributes once, and refuses by
`DistillationError` what it does not cover, so that a mirror is either whole or not made. Integer tensors are
int64 whatever the graph says; all floats are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import openvino as ov
import torch

from vinoopt.errors import DistillationError

Function: TypeAlias = Callable[..., Any]
"""Input tensors to the output tensor, or to a tuple of them."""
Rule: TypeAlias = Callable[[ov.Node], Function]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for these operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def function_of(node: ov.Node) -> Function:
    """The node in PyTorch; raises `DistillationError` with its name where there is no rule for it."""
    kind = node.get_type_name()
    if kind not in RULES:
        raise DistillationError(f"no rule to train through operator {kind} ('{node.get_friendly_name()}')")
    if node.get_attributes().get("auto_broadcast", "numpy") == "pdpd":
        raise refuse(node, "PDPD broadcasting")
    return RULES[kind](node)


def refuse(node: ov.Node, what: str) -> DistillationError:
    """The error that says what of this node is not covered."""
    return DistillationError(
        f"no rule to train through {what} of operator {node.get_type_name()} ('{node.get_friendly_name()}')"
    )


def whole(values: Any) -> list[int]:
    """A tensor of whole numbers as a list; a scalar as a list of one."""
    return [int(v) for v in torch.as_tensor(values).reshape(-1).tolist()]


def to_type(name: str) -> Function:
    """The conversion to an OpenVINO element type, as a mirror keeps it."""
    if name.startswith(("f", "bf")):
        return lambda x: x.to(torch.float32)
    if name == "boolean":
        return lambda x: x.to(torch.bool)
    return lambda x: x.to(torch.int64)  # truncates towards zero, as OpenVINO does
