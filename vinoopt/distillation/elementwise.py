"""Rules of operators that work value by value, and of reductions and normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openvino as ov
import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.distillation.rules import RULES, Function, refuse, rule, to_type, whole

UNARY: dict[str, Function] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceiling": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HSigmoid": lambda x: F.relu6(x + 3) / 6,
    "HSwish": F.hardswish,
    "IsFinite": torch.isfinite,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "LogicalNot": torch.logical_not,
    "Mish": F.mish,
    "Negative": torch.neg,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "SoftPlus": F.softplus,
    "SoftSign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

BINARY: dict[str, Function] = {
    "Add": torch.add,
    "Subtract": torch.sub,
    "Multiply": torch.mul,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Power": torch.pow,
    "Mod": torch.fmod,
    "FloorMod": torch.remainder,
    "SquaredDifference": lambda a, b: (a - b) ** 2,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "LogicalXor": torch.logical_xor,
    "Select": torch.where,
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
    "Selu": lambda x, alpha, scale: scale * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0))),
    "ConvertLike": lambda x, like: x.to(like.dtype),
}

for _name, _function in (UNARY | BINARY).items():
    RULES[_name] = lambda node, f=_function: f  # type: ignore[misc]


@rule("Divide")
def _divide(node: ov.Node) -> Function:
    floors = bool(node.get_attributes().get("m_pythondiv", True))

    def divide(a: Any, b: Any) -> Any:
        if a.is_floating_point():
            return a / b
        return torch.div(a, b, rounding_mode="floor" if floors else "trunc")

    return divide


@rule("Clamp")
def _clamp(node: ov.Node) -> Function:
    low, high = (float(node.get_attributes()[key]) for key in ("min", "max"))
    return lambda x: torch.clamp(x, low, high)


@rule("Elu")
def _elu(node: ov.Node) -> Function:
    alpha = float(node.get_attributes()["alpha"])
    return lambda x: F.elu(x, alpha)


@rule("Gelu")
def _gelu(node: ov.Node) -> Function:
    mode = str(node.get_attributes().get("approximation_mode", "ERF")).lower()
    return lambda x: F.gelu(x, approximate="tanh" if mode == "tanh" else "none")


@rule("Round")
def _round(node: ov.Node) -> Function:
    if node.get_attributes()["mode"] == "half_to_even":
        return torch.round  # type: ignore[no-any-return]
    return lambda x: torch.sign(x) * torch.floor(torch.abs(x) + 0.5)


@rule("Swish")
def _swish(node: ov.Node) -> Function:
    return lambda x, beta=None: F.silu(x) if beta is None else x * torch.sigmoid(beta * x)


@rule("PRelu")
def _prelu(node: ov.Node) -> Function:
    def prelu(x: Any, slope: Any) -> Any:
        if slope.ndim == 1 and x.ndim > 1 and slope.shape[0] in (1, x.shape[1]):  # one per channel, as in PyTorch
            slope = slope.reshape(1, -1, *[1] * (x.ndim - 2))
        return torch.where(x >= 0, x, x * slope)

    return prelu


@rule("Convert")
def _convert(node: ov.Node) -> Function:
    return to_type(str(node.get_attributes()["destination_type"]))


@rule("Softmax", "LogSoftmax")
def _softmax(node: ov.Node) -> Function:
    axis = int(node.get_attributes()["axis"])
    function = F.softmax if node.get_type_name() == "Softmax" else F.log_softmax
    return lambda x: function(x, dim=axis)


# --------------------------------------------------------------------------- reductions

_REDUCTIONS: dict[str, Function] = {
    "ReduceMean": lambda x, d, k: x.mean(d, k) if x.is_floating_point() else _whole_mean(x, d, k),
    "ReduceSum": lambda x, d, k: x.sum(d, k),
    "ReduceMax": lambda x, d, k: x.amax(d, k),
    "ReduceMin": lambda x, d, k: x.amin(d, k),
    "ReduceL1": lambda x, d, k: x.abs().sum(d, k),
    "ReduceL2": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),  # whose gradient at 0 is a number
    "ReduceLogicalAnd": lambda x, d, k: _each(torch.all, x, d, k),
    "ReduceLogicalOr": lambda x, d, k: _each(torch.any, x, d, k),
    "ReduceProd": lambda x, d, k: _each(torch.prod, x, d, k),
}


def _whole_mean(x: Any, dims: Sequence[int], keep: bool) -> Any:
    return x.to(torch.float64).mean(dims, keep).trunc().to(torch.int64)


def _each(function: Function, x: Any, dims: Sequence[int], keep: bool) -> Any:
    """For reductions that take one axis at a time."""
    for dim in sorted((d % x.ndim for d in dims), reverse=True):
        x = function(x, dim, keep)
    return x


def _reduce(node: ov.Node) -> Function:
    function = _REDUCTIONS[node.get_type_name()]
    keep = bool(node.get_attributes()["keep_dims"])

    def reduce(x: Any, axes: Any) -> Any:
        dims = whole(axes)
        return function(x, dims, keep) if dims else x

    return reduce


for _name in _REDUCTIONS:
    RULES[_name] = _reduce


@rule("CumSum")
def _cumsum(node: ov.Node) -> Function:
    exclusive, reverse = (bool(node.get_attributes()[key]) for key in ("exclusive", "reverse"))

    def cumsum(x: Any, axis: Any) -> Any:
        dim = int(axis)
        x = x.flip(dim) if reverse else x
        y = torch.cumsum(x, dim)
        y = y - x if exclusive else y
        return y.flip(dim) if reverse else y

    return cumsum


# --------------------------------------------------------------------------- normalizations


@rule("MVN")
def _mvn(node: ov.Node) -> Function:
    attributes = node.get_attributes()
    eps, scales = float(attributes["eps"]), bool(attributes.get("normalize_variance", True))
    inside = str(attributes.get("eps_mode", "INSIDE_SQRT")).upper() == "INSIDE_SQRT"

    def mvn(x: Any, axes: Any = None) -> Any:
        dims = list(range(2, x.ndim)) if axes is None else whole(axes)
        x = x - x.mean(dims, True)
        if not scales:
            return x
        variance = x.square().mean(dims, True)
        return x / (torch.sqrt(variance + eps) if inside else torch.sqrt(variance) + eps)

    return mvn


@rule("NormalizeL2")
def _normalize_l2(node: ov.Node) -> Function:
    attributes = node.get_attributes()
    eps, adds = float(attributes["eps"]), attributes["eps_mode"] == "add"

    def normalize(x: Any, axes: Any) -> Any:
        dims = whole(axes)
        squares = x.square().sum(dims, True) if dims else x.square()
        return x / torch.sqrt(squares + eps if adds else torch.clamp(squares, min=eps))

    return normalize


@rule("LRN")
def _lrn(node: ov.Node) -> Function:
    a = node.get_attributes()
    alpha, beta, bias, size = float(a["alpha"]), float(a["beta"]), float(a["bias"]), int(a["size"])

    def lrn(x: Any, axes: Any) -> Any:
        if whole(axes) != [1]:
            raise refuse(node, "other axes than the channels")
        return F.local_response_norm(x, size, alpha, beta, bias)

    return lrn


@rule("BatchNormInference")
def _batch_norm(node: ov.Node) -> Function:
    eps = float(node.get_attributes()["epsilon"])

    def batch_norm(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=eps)

    return batch_norm


@rule("GroupNormalization")
def _group_norm(node: ov.Node) -> Function:
    groups, eps = int(node.get_attributes()["num_groups"]), float(node.get_attributes()["epsilon"])
    return lambda x, scale, bias: F.group_norm(x, groups, scale, bias, eps)


@rule("GRN")
def _grn(node: ov.Node) -> Function:
    bias = float(node.get_attributes()["bias"])
    return lambda x: x / torch.sqrt(x.square().sum(1, True) + bias)
