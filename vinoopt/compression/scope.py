"""Which layers the user wants left alone: names, patterns and types, resolved against the graph once."""

from __future__ import annotations

import re
from collections.abc import Sequence

import openvino as ov

from vinoopt.errors import PlanError
from vinoopt.serde import nearest


def resolve_ignored(model: ov.Model, scope: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers that `scope` means, in graph order; pruning and quantization both respect them.

    An entry is a layer's friendly name, `re:PATTERN` (a regular expression that matches the whole name) or
    `type:NAME` (an OpenVINO operator type), after NNCF's `IgnoredScope(names, patterns, types)`.
    Raises `PlanError` for an entry that matches nothing or is not a regular expression.
    """
    layers = [(node.get_friendly_name(), node.get_type_name()) for node in model.get_ordered_ops()]
    layers = [(name, kind) for name, kind in layers if kind not in ("Constant", "Parameter", "Result")]
    chosen: set[str] = set()
    for entry in scope:
        found = {name for name, kind in layers if _matches(entry, name, kind)}
        if not found:
            hint = nearest(entry.removeprefix("type:"), [k for _, k in layers] + [n for n, _ in layers])
            raise PlanError(f'ignored scope "{entry}" matches no layer of the model{hint}')
        chosen |= found
    return tuple(name for name, _ in layers if name in chosen)


def _matches(entry: str, name: str, kind: str) -> bool:
    if entry.startswith("type:"):
        return kind == entry.removeprefix("type:")
    if not entry.startswith("re:"):
        return name == entry
    try:
        return re.fullmatch(entry.removeprefix("re:"), name) is not None
    except re.error as exc:
        raise PlanError(f'ignored scope "{entry}" is not a regular expression: {exc}') from exc
