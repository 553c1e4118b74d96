"""Operator rules of the coupling: layers with weights, and products of activations."""

from __future__ import annotations

import numpy as np
import openvino as ov

from vinoopt.compression.coupling import Contraction, Labels, Site, Trace


def convolution(trace: Trace, node: ov.Node) -> None:
    """It reads input channels and makes output channels."""
    _convolution(trace, node, out_axis=0, in_axis=1)


def convolution_backprop(trace: Trace, node: ov.Node) -> None:
    """A transposed convolution; its weight lies with the input channels first."""
    _convolution(trace, node, out_axis=1, in_axis=0)


def _convolution(trace: Trace, node: ov.Node, *, out_axis: int, in_axis: int) -> None:
    inputs = trace.all_dims(node, 2)
    if inputs is None or not trace.is_constant(node, 1):
        trace.freeze_node(node, "its weight is not constant")
        return
    data, weight = inputs
    name = node.get_friendly_name()
    for labels in (*data[2:], *weight[2:]):
        trace.freeze(labels, f"window of '{name}'")
    rows, columns = weight[out_axis], weight[in_axis]
    if rows is None or columns is None or data[1] is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    trace.link(data[1], columns, f"channels of '{name}'")
    trace.contractions.append(
        Contraction(
            name=name,
            node=node.get_name(),
            columns=columns,
            rows=rows,
            data_port=0,
            column_axis=1,
            row_axis=1,
        )
    )
    trace.put(node, (data[0], rows, *trace.window_dims(node)))


def group_convolution(trace: Trace, node: ov.Node) -> None:
    """Groups times positions; one channel a group (depthwise) just passes labels on."""
    _group_convolution(trace, node, out_axis=1, in_axis=2)


def group_convolution_backprop(trace: Trace, node: ov.Node) -> None:
    """The same, with input positions before output positions."""
    _group_convolution(trace, node, out_axis=2, in_axis=1)


def _group_convolution(trace: Trace, node: ov.Node, *, out_axis: int, in_axis: int) -> None:
    inputs = trace.all_dims(node, 2)
    if inputs is None or not trace.is_constant(node, 1):
        trace.freeze_node(node, "its weight is not constant")
        return
    data, weight = inputs
    name = node.get_friendly_name()
    for labels in (*data[2:], *weight[3:]):
        trace.freeze(labels, f"window of '{name}'")
    groups, inner, outer = weight[0], weight[in_axis], weight[out_axis]
    if data[1] is None or groups is None or inner is None or outer is None:
        trace.freeze_node(node, "unknown number of channels")
        return
    reads = inner.size > 1
    _factor(trace, node, "columns", data[1], (groups, inner))
    rows = groups
    if outer.size > 1:
        rows = trace.atoms(groups.size * outer.size, f"output of '{name}'")
        _factor(trace, node, "rows", rows, (groups, outer))
    else:
        trace.freeze(outer, f"'{name}' has one output a group")
    trace.contractions.append(
        Contraction(
            name=name,
            node=node.get_name(),
            columns=data[1] if reads else np.empty(0, np.int64),
            rows=rows,
            data_port=0,
            column_axis=1,
            row_axis=1,
            site=(node.get_name(), "columns"),
        )
    )
    trace.put(node, (data[0], rows, *trace.window_dims(node)))


def _factor(trace: Trace, node: ov.Node, place: str, flat: Labels, factors: tuple[Labels, Labels]) -> None:
    """The channels of a grouped convolution are groups times positions; whole groups are preferred."""
    name = node.get_friendly_name()
    if factors[1].size == 1:
        trace.freeze(factors[1], f"'{name}' has one channel a group")
        trace.link(flat, factors[0], f"groups of '{name}'")
        return
    site = Site(key=(node.get_name(), place), layer=name, flat=flat, factors=factors, preferred=0)
    trace.sites.append(site)


def matmul(trace: Trace, node: ov.Node) -> None:
    """With one constant side it is a layer; two activations link batch dimensions and keep what they sum over."""
    inputs = trace.all_dims(node)
    if inputs is None or min(len(dims) for dims in inputs) < 2:
        trace.freeze_node(node, "a product with a vector")
        return
    attributes, name = node.get_attributes(), node.get_friendly_name()
    # (axis that stays, axis that is summed) of either side
    left_axes = (-1, -2) if attributes["transpose_a"] else (-2, -1)
    right_axes = (-2, -1) if attributes["transpose_b"] else (-1, -2)
    left, right = inputs
    batch = trace.broadcast((left[:-2], right[:-2]), f"'{name}' broadcasts it")
    trace.link(left[left_axes[1]], right[right_axes[1]], f"sum of '{name}'")
    sides = ((left, left_axes), (right, right_axes))
    weights = [port for port in (0, 1) if trace.is_constant(node, port)]
    if len(weights) == 1 and len(inputs[weights[0]]) == 2:
        _matmul_layer(trace, node, weights[0], sides)
    else:
        why = (
            "has a weight of more than two dimensions"
            if len(weights) == 1
            else "multiplies two activations over it"
        )
        for dims, axes in sides:
            trace.freeze(dims[axes[1]], f"'{name}' {why}")
    trace.put(node, (*batch, left[left_axes[0]], right[right_axes[0]]))


Side = tuple[tuple[Labels | None, ...], tuple[int, int]]


def _matmul_layer(trace: Trace, node: ov.Node, weight_port: int, sides: tuple[Side, Side]) -> None:
    weight, (kept_axis, summed_axis) = sides[weight_port]
    rows, columns = weight[kept_axis], weight[summed_axis]
    if columns is None or rows is None:
        return
    trace.contractions.append(
        Contraction(
            name=node.get_friendly_name(),
            node=node.get_name(),
            columns=columns,
            rows=rows,
            data_port=1 - weight_port,
            column_axis=sides[1 - weight_port][1][1],
            row_axis=-2 if weight_port == 0 else -1,
        )
    )


def attention(trace: Trace, node: ov.Node) -> None:
    """Value features and heads pass; the default scale depends on the number of query features."""
    inputs = trace.all_dims(node)
    if inputs is None or any(len(dims) < 2 for dims in inputs[:3]) or node.get_input_size() > 5:
        trace.freeze_node(node, "unknown rank")
        return
    name = node.get_friendly_name()
    query, key, value = inputs[:3]
    trace.link(query[-1], key[-1], f"scores of '{name}'")
    trace.freeze(query[-1], f"'{name}' multiplies two activations over it")
    trace.freeze(key[-1], f"'{name}' multiplies two activations over it")
    for labels in (query[-2], key[-2], value[-2]):
        trace.freeze(labels, f"softmax of '{name}'")
    why = f"'{name}' broadcasts it"
    batch = trace.broadcast([dims[:-2] for dims in inputs[:3]], why)
    for extra in inputs[3:]:
        if len(extra) >= 2:
            trace.broadcast([batch, extra[:-2]], why)
            trace.freeze(extra[-1], f"mask of '{name}'")
            trace.freeze(extra[-2], f"mask of '{name}'")
        else:
            for labels in extra:
                trace.freeze(labels, f"scale or mask of '{name}'")
    trace.put(node, (*batch, query[-2], value[-1]))


def einsum(trace: Trace, node: ov.Node) -> None:
    """Equal letters are linked; letters that are summed over stay."""
    inputs = trace.all_dims(node)
    equation = str(node.get_attributes()["equation"]).replace(" ", "")
    terms, arrow, made = equation.partition("->")
    letters = terms.split(",")
    if (
        inputs is None
        or not arrow
        or "." in equation
        or any(len(set(term)) != len(term) for term in (*letters, made))
        or any(len(term) != len(dims) for term, dims in zip(letters, inputs, strict=True))
    ):
        trace.freeze_node(node, "an equation with an ellipsis, a diagonal or no output")
        return
    name = node.get_friendly_name()
    found: dict[str, Labels | None] = {}
    for term, dims in zip(letters, inputs, strict=True):
        for letter, labels in zip(term, dims, strict=True):
            one = (found[letter],) if letter in found else ()
            found[letter] = trace.broadcast([one, (labels,)], f"'{name}' broadcasts it")[0]
            if letter not in made:
                trace.freeze(labels, f"'{name}' sums over it")
    trace.put(node, tuple(found[letter] for letter in made))
