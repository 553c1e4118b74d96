"""One rule per OpenVINO operator: what it does, said in PyTorch.

A rule takes the node and gives the function of its input tensors. It reads attributes once, and refuses by
`DistillationError` what it does not cover, so that a mirror is either whole or not made. Integer tensors are
int64 whatever the graph says; all floats are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import openvino as ov
import torch

from vinoopt.errors import DistillationError

Function: TypeAlias = Callable[..., Any]
"""Input tensors to the output tensor, or to a tuple of them."""
Rule: TypeAlias = Callable[[ov.Node], Function]

RULES: dict[str, Rule] = {}

FOREIGN_ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What PyTorch and OpenVINO raise for a graph, a shape or a machine that they cannot serve."""


@contextmanager
def failing(doing: str) -> Iterator[None]:
    """Makes what PyTorch or OpenVINO raises inside the block a `DistillationError` that says what was being done."""
    try:
        yield
    except FOREIGN_ERRORS as exc:
        raise DistillationError(f"{doing} failed: {first_line(exc)}") from exc


def first_line(exc: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(exc).splitlines() or [type(exc).__name__])[0]


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
    with failing(f"reading operator {kind} ('{node.get_friendly_name()}')"):
        return RULES[kind](node)


def refuse(node: ov.Node, what: str) -> DistillationError:
    """The error that says what of this node is not covered."""
    return DistillationError(
        f"no rule to train through {what} of operator {node.get_type_name()} ('{node.get_friendly_name()}')"
    )


def wide(values: Any) -> Any:
    """An input as a mirror takes it: floats and booleans as they are, whole numbers as int64."""
    return values if values.is_floating_point() or values.dtype == torch.bool else values.to(torch.int64)


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
