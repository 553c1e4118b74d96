"""Names for the nodes of a graph: each its own, each the same in every run.

OpenVINO numbers the nodes it makes from a counter of the process, so two loads of one file differ. Here a
node keeps the ONNX name it has, and any other is named after the nearest node downstream that has one.
"""

from __future__ import annotations

import openvino as ov

from vinoopt.records import TensorSpec

_CONTROL = dict.fromkeys((*range(32), 127), "_")
"""Characters that XML cannot hold, so the IR could not be read back."""


def assign_names(
    model: ov.Model, known: frozenset[str], *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """Give every node of `model` a unique, reproducible friendly name, and outputs their ONNX tensor names.

    `known` are the names that the ONNX file itself uses.
    """
    taken: set[str] = set()
    for node, spec in zip(model.get_parameters(), inputs, strict=True):
        node.set_friendly_name(_free(spec.name, taken))
    for node, spec in zip(model.get_results(), outputs, strict=True):
        node.set_friendly_name(_free(f"{spec.name}/result", taken))
    _name_graph(model, known, taken, anchor="")
    for port, spec in zip(model.outputs, outputs, strict=True):
        if spec.name not in port.get_names():
            port.get_tensor().add_names({spec.name})


def bodies(node: ov.Node) -> list[ov.Model]:
    """The graphs inside an If, Loop or TensorIterator."""
    if node.get_type_name() == "If":
        return [node.get_function(0), node.get_function(1)]
    if node.get_type_name() in ("Loop", "TensorIterator"):
        return [node.get_function()]
    return []


def _name_graph(model: ov.Model, known: frozenset[str], taken: set[str], *, anchor: str) -> None:
    """Consumers first, so that each node finds the name it is to be called after."""
    doors = (
        {node.get_name() for node in (*model.get_parameters(), *model.get_results())} if not anchor else set()
    )
    order = list(reversed(model.get_ordered_ops()))
    position = {node.get_name(): index for index, node in enumerate(order)}
    keep = _keepers(order, known, doors)
    anchors: dict[str, str] = {}
    for node in order:
        key = node.get_name()
        after = _anchor(node, anchors, position) or anchor
        if key in doors:
            name = node.get_friendly_name()
        elif key in keep:
            name = _free(node.get_friendly_name(), taken)
        else:
            name = _free("/".join(part for part in (after, node.get_type_name()) if part), taken)
        node.set_friendly_name(name)
        anchors[key] = after if key not in keep and after else name.removesuffix("/result")
        for index, body in enumerate(bodies(node)):
            _name_graph(body, known, taken, anchor=f"{name}/body{index}")


def _keepers(order: list[ov.Node], known: frozenset[str], doors: set[str]) -> set[str]:
    """Nodes that keep their ONNX name: the one nearest the inputs where several claim the same."""
    claims: dict[str, str] = {}
    for node in order:
        if node.get_friendly_name() in known and node.get_name() not in doors:
            claims.setdefault(node.get_friendly_name(), node.get_name())
    return set(claims.values())


def _anchor(node: ov.Node, anchors: dict[str, str], position: dict[str, int]) -> str:
    consumers = {t.get_node().get_name() for output in node.outputs() for t in output.get_target_inputs()}
    inside = [name for name in consumers if name in anchors]
    return anchors[max(inside, key=position.__getitem__)] if inside else ""


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number where it is taken."""
    base = name.translate(_CONTROL)
    candidate, number = base, 1
    while candidate in taken:
        number += 1
        candidate = f"{base}_{number}"
    taken.add(candidate)
    return candidate
