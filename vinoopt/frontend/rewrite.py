"""ONNX features that OpenVINO does not read, written in ones it does: local functions, sparse weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import external_data_helper, inliner, numpy_helper

from vinoopt.errors import ModelError, UnsupportedModelError
from vinoopt.frontend.load import (
    DEFAULT_DOMAINS,
    MAX_PROTOBUF_BYTES,
    OnnxFile,
    graphs_of,
    read_proto,
    walk_nodes,
)


def rewritten(facts: OnnxFile, expand: Sequence[tuple[str, str]] = ()) -> onnx.ModelProto | None:
    """The model with functions inlined and sparse weights dense, in memory; None where it needs neither.

    `expand` names operators (domain, type) to write out in simpler ones, where ONNX defines them so. Raises
    `UnsupportedModelError` where the result would pass the 2 GB that a model in memory may have.
    """
    if not (facts.has_functions or facts.has_sparse_weights or expand):
        return None
    if facts.size_bytes > MAX_PROTOBUF_BYTES:
        raise UnsupportedModelError(
            f"{facts.path}: local functions and sparse weights are read up to 2 GB; inline and densify the model "
            "first (onnx.inliner.inline_local_functions) and save it with external data"
        )
    proto = read_proto(facts.path)
    external_data_helper.load_external_data_for_model(proto, str(facts.path.parent))
    if facts.has_functions:
        proto = inliner.inline_local_functions(proto)
    if expand:
        proto = inliner.inline_selected_functions(proto, list(expand), inline_schema_functions=True)
    for graph in _all_graphs(proto):
        _densify(facts, graph)
    return proto


def _all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for node, _ in walk_nodes(proto):
        for attribute in node.attribute:
            yield from graphs_of(attribute)


def _densify(facts: OnnxFile, graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(facts, sparse, sparse.values.name))
    graph.ClearField("sparse_initializer")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                tensor = _dense(facts, attribute.sparse_tensor, next(iter(node.output), ""))
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _dense(facts: OnnxFile, sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(sparse.values)
    size = math.prod(sparse.dims)
    if size * values.itemsize > MAX_PROTOBUF_BYTES:
        raise UnsupportedModelError(f'{facts.path}: sparse weight "{name}" has over 2 GB when it is dense')
    places = numpy_helper.to_array(sparse.indices)
    flat = np.zeros(size, dtype=values.dtype)
    try:
        if places.ndim == 2:
            places = np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))
        flat[places] = values
    except (ValueError, IndexError) as exc:
        raise ModelError(f'{facts.path}: sparse weight "{name}" has indices outside its shape') from exc
    return numpy_helper.from_array(flat.reshape(sparse.dims), name)


def expandable(nodes: Sequence[onnx.NodeProto], opset: int) -> list[tuple[str, str]]:
    """(domain, type) of the operators of `nodes` that ONNX defines by simpler ones."""
    found = set()
    for node in nodes:
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        version = opset if domain == "" else 1
        if not onnx.defs.has(node.op_type, max_inclusive_version=version, domain=domain):
            continue
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=domain)
        if schema.has_function or schema.has_context_dependent_function:
            found.add((domain, node.op_type))
    return sorted(found)
