"""Read an ONNX file: is it one, is it whole, what goes in and out, is it already quantized.

Tensors are never loaded: a model of many gigabytes costs the size of its graph here. External data is opened
only inside the model's own folder.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vinoopt.errors import ModelError, UnsupportedModelError
from vinoopt.records import TensorSpec
from vinoopt.serde import CHUNK_BYTES

ANY_RANK: tuple[int | str, ...] = ("...",)
"""The shape of a tensor whose number of dimensions is not known."""

DEFAULT_DOMAINS = ("", "ai.onnx")

_MIN_IR = 3
MAX_PROTOBUF_BYTES = (1 << 31) - 1

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer, not the model; run `git lfs pull` to fetch the model",
    ),
    (0, b"PK\x03\x04", "a zip archive, as PyTorch and Keras write; export the model to ONNX first"),
    (0, b"\x80\x02", "a Python pickle, as old PyTorch writes; export the model to ONNX first"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes; export the model to ONNX first"),
    (4, b"TFL3", "a TensorFlow Lite model; give the ONNX model it was made from"),
    (4, b"ORTM", "an ONNX Runtime .ort file; give the ONNX model it was made from"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"<!DOCTYPE", "a web page, so the download failed; download the model again"),
    (0, b"<html", "a web page, so the download failed; download the model again"),
    (0, b"<?xml", "an XML file, as OpenVINO IR is; give the ONNX model it was made from"),
)

_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "FakeQuantize",
    }
)


_NOT_COMPUTED = {
    onnx.TensorProto.STRING: "strings",
    onnx.TensorProto.COMPLEX64: "complex numbers",
    onnx.TensorProto.COMPLEX128: "complex numbers",
}
_KINDS = {
    "sequence_type": "a sequence",
    "map_type": "a map",
    "optional_type": "an optional value",
    "sparse_tensor_type": "a sparse tensor",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxFile:
    """What an ONNX file says about itself."""

    path: Path
    ir_version: int
    opset: int
    """Version of the default domain; 0 where the model does not use it."""
    inputs: tuple[TensorSpec, ...]
    """Real inputs: initializers that are listed as inputs are left out."""
    outputs: tuple[TensorSpec, ...]
    quantized: str
    """Why it counts as already quantized; empty where it does not."""
    has_half_precision: bool
    """Whether anything in it is float16 or bfloat16."""
    sha256: str
    """Over the file and its external data."""
    size_bytes: int
    """Of the file and its external data."""
    has_functions: bool
    """Whether it calls functions of its own."""
    has_sparse_weights: bool
    external_data: tuple[Path, ...] = ()
    complaint: str = ""
    """What onnx.checker finds wrong with it; empty where it is valid."""
    names: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of all inputs, nodes and tensors that the graph's nodes produce, and of its weights."""


def load_onnx(path: Path) -> OnnxFile:
    """The facts of the ONNX file at `path`, checked, without its tensors in memory.

    Raises `ModelError` where the file is missing, damaged, not ONNX, or its external data is missing or lies
    outside the model's folder; `UnsupportedModelError` where an input or output is not a tensor of numbers,
    or the format is older than IR 3.
    """
    proto = read_proto(path)
    opset = _checked_versions(path, proto)
    graph = proto.graph
    external = _checked_external_data(path, proto)
    constants = constant_names(graph)
    inputs = tuple(_spec(path, value, "input", graph) for value in graph.input if value.name not in constants)
    outputs = tuple(_spec(path, value, "output", graph) for value in graph.output)
    if not outputs:
        raise ModelError(f"{path}: the graph has no outputs; export the model again and name its outputs")
    facts = OnnxFile(
        path=path,
        ir_version=proto.ir_version,
        opset=opset,
        inputs=inputs,
        outputs=outputs,
        quantized=_quantized(proto),
        has_functions=bool(proto.functions),
        has_sparse_weights=_has_sparse_weights(proto),
        has_half_precision=_has_half_precision(proto),
        sha256=_sha256(path, external),
        size_bytes=sum(file.stat().st_size for file in (path, *external)),
        external_data=external,
        complaint="",
        names=names_in(proto),
    )
    del proto, graph  # the checker below reads the file a second time: hold one copy of the graph, not two
    return _with_complaint(facts)


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph of the ONNX file at `path`, without its external data; raises `ModelError`."""
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the .onnx file inside it")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(64)
            _check_head(path, head, size)
            payload = head + stream.read()
    except OSError as exc:
        raise ModelError(f"{path}: cannot be read: {exc.strerror}") from exc
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(payload)
    except DecodeError as exc:
        raise ModelError(
            f"{path}: not an ONNX model, or cut short ({size} bytes); copy or export it again"
        ) from exc
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(f"{path}: not an ONNX model (no graph in it); export the model to ONNX first")
    return proto


def _check_head(path: Path, head: bytes, size: int) -> None:
    if size == 0:
        raise ModelError(f"{path}: the file is empty; copy or export it again")
    for offset, mark, what in _SIGNATURES:
        if head[offset:].lstrip().startswith(mark):
            raise ModelError(f"{path}: this is {what}")
    if size > MAX_PROTOBUF_BYTES:
        raise ModelError(
            f"{path}: a single ONNX file cannot exceed 2 GB (this has {size / 2**30:.1f} GB); save it with "
            "external data: onnx.save(model, path, save_as_external_data=True)"
        )


def _checked_versions(path: Path, proto: onnx.ModelProto) -> int:
    """The opset of the default domain."""
    if proto.ir_version < _MIN_IR:
        raise UnsupportedModelError(
            f"{path}: IR version {proto.ir_version} is older than {_MIN_IR}, the oldest that is read; "
            "export the model again with a newer exporter"
        )
    opset = max((o.version for o in proto.opset_import if o.domain in DEFAULT_DOMAINS), default=0)
    uses_default = any(node.domain in DEFAULT_DOMAINS for node in proto.graph.node)
    if opset == 0 and uses_default:
        raise ModelError(
            f"{path}: no opset version in it, so it is cut short or damaged; copy or export it again"
        )
    return opset


def _with_complaint(facts: OnnxFile) -> OnnxFile:
    """`facts` with what the checker says.

    Exporters write files that run everywhere and still break a rule of the checker (a missing graph name, a
    shape left out): whether the file can be used is decided by reading it, the complaint is for the message.
    """
    try:
        onnx.checker.check_model(str(facts.path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as exc:
        first = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        return replace(facts, complaint=first.rstrip(".:"))
    return facts


# --------------------------------------------------------------------------- graph walks


def walk_nodes(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, tuple[onnx.NodeProto, ...]]]:
    """Every node of the model with the nodes it lies inside (If, Loop, Scan), outermost first."""
    yield from _walk_graph(list(proto.graph.node), ())
    for function in proto.functions:
        yield from _walk_graph(list(function.node), ())


def _walk_graph(
    nodes: list[onnx.NodeProto], outer: tuple[onnx.NodeProto, ...]
) -> Iterator[tuple[onnx.NodeProto, tuple[onnx.NodeProto, ...]]]:
    for node in nodes:
        yield node, outer
        for attribute in node.attribute:
            for graph in graphs_of(attribute):
                yield from _walk_graph(list(graph.node), (*outer, node))


def graphs_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The graphs that an attribute holds (branches, loop bodies)."""
    if attribute.type == onnx.AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs)


def constant_names(graph: onnx.GraphProto) -> set[str]:
    """Names of the initializers, dense and sparse."""
    return {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    for node, _ in walk_nodes(proto):
        for attribute in node.attribute:
            graphs.extend(graphs_of(attribute))
            yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)


def names_in(proto: onnx.ModelProto) -> frozenset[str]:
    """Names of all inputs, weights, nodes and the tensors they produce."""
    graph = proto.graph
    names = {value.name for value in graph.input} | constant_names(graph)
    for node, outer in walk_nodes(proto):
        names.add(node.name)
        names.update(node.output)
        for attribute in node.attribute if not outer else ():
            for inner in graphs_of(attribute):
                names.update(value.name for value in inner.input)
                names.update(constant_names(inner))
    return frozenset(names - {""})


def _has_half_precision(proto: onnx.ModelProto) -> bool:
    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    doors = (*proto.graph.input, *proto.graph.output)
    casts = (a.i for node, _ in walk_nodes(proto) for a in node.attribute if a.name in ("to", "dtype"))
    return (
        any(value.type.tensor_type.elem_type in half for value in doors)
        or any(tensor.data_type in half for tensor in _tensors(proto))
        or any(kind in half for kind in casts)
    )


def _has_sparse_weights(proto: onnx.ModelProto) -> bool:
    attributes = [attribute for node, _ in walk_nodes(proto) for attribute in node.attribute]
    inner = [graph for attribute in attributes for graph in graphs_of(attribute)]
    return any(graph.sparse_initializer for graph in (proto.graph, *inner)) or any(
        attribute.type == onnx.AttributeProto.SPARSE_TENSOR for attribute in attributes
    )


def _quantized(proto: onnx.ModelProto) -> str:
    counts = Counter(
        node.op_type
        for node, _ in walk_nodes(proto)
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear")
    )
    if not counts:
        return ""
    return "it holds " + ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))


# --------------------------------------------------------------------------- inputs and outputs


def _spec(path: Path, value: onnx.ValueInfoProto, role: str, graph: onnx.GraphProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind not in (None, "tensor_type"):
        raise UnsupportedModelError(_not_a_tensor(path, value.name, role, kind, graph))
    tensor = value.type.tensor_type
    if tensor.elem_type in _NOT_COMPUTED:
        raise UnsupportedModelError(
            f'{path}: {role} "{value.name}" holds {_NOT_COMPUTED[tensor.elem_type]}, which the devices cannot '
            "compute with; cut that part off with onnx.utils.extract_model and give real numbers"
        )
    shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else ANY_RANK
    return TensorSpec(name=value.name, shape=shape, dtype=_dtype(tensor.elem_type))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else "?"


def _dtype(elem_type: int) -> str:
    if elem_type == onnx.TensorProto.UNDEFINED:
        return "undefined"
    return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type).name)


def _not_a_tensor(path: Path, name: str, role: str, kind: str, graph: onnx.GraphProto) -> str:
    what = _KINDS.get(kind, kind)
    producer = next((node for node in graph.node if name in node.output), None)
    if role == "input" or producer is None:
        return (
            f'{path}: {role} "{name}" is {what}, not a tensor, which OpenVINO cannot take; '
            "cut that part off with onnx.utils.extract_model"
        )
    if producer.domain in DEFAULT_DOMAINS:
        return (
            f'{path}: output "{name}" is {what}, not a tensor: it comes from {describe(producer)}, and '
            "OpenVINO gives tensors only; cut that part off with onnx.utils.extract_model"
        )
    before = ", ".join(f'"{each}"' for each in producer.input if each)
    hint = " (scikit-learn exporters: options={'zipmap': False})" if producer.op_type == "ZipMap" else ""
    return (
        f'{path}: output "{name}" is {what}, not a tensor: it comes from {describe(producer)}, which '
        f"OpenVINO has no operator for; end the model before it, at {before}, "
        f"with onnx.utils.extract_model{hint}"
    )


def describe(node: onnx.NodeProto) -> str:
    """`node "name" (operator Op, domain d)`; a node without a name is called by its first output."""
    where = (
        f'node "{node.name}"'
        if node.name
        else f'the unnamed node with output "{next(iter(node.output), "")}"'
    )
    return f"{where} (operator {node.op_type}, domain {node.domain or 'ai.onnx'})"


# --------------------------------------------------------------------------- external data


def _checked_external_data(path: Path, proto: onnx.ModelProto) -> tuple[Path, ...]:
    """The model's external files, sorted; raises `ModelError` where one is missing, short or elsewhere."""
    needed: dict[str, int] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        except ValueError as exc:
            raise ModelError(f'{path}: tensor "{tensor.name}" has a malformed offset or length') from exc
        location = entries.get("location", "")
        needed[location] = max(needed.get(location, 0), end)
    return tuple(sorted({_external_file(path, location, end) for location, end in needed.items()}))


def _external_file(path: Path, location: str, end: int) -> Path:
    windows = PureWindowsPath(location)
    outside = windows.is_absolute() or windows.drive or location.startswith(("/", "\\"))
    if not location or outside or ".." in PurePosixPath(location).parts + windows.parts:
        raise ModelError(
            f'{path}: external data "{location}" does not lie in the model\'s folder; it is not opened. '
            "Put the file beside the model and save the model again with a relative location"
        )
    folder = path.parent.resolve()
    file = path.parent / location
    if not file.resolve().is_relative_to(folder):
        raise ModelError(
            f'{path}: external data "{location}" is a link that leads out of the model\'s folder; it is not '
            "opened. Copy the file itself beside the model"
        )
    if not file.is_file():
        raise ModelError(f'{path}: its external data file "{location}" is missing; put it beside the model')
    size = file.stat().st_size
    if size < end:
        raise ModelError(
            f'{path}: its external data file "{location}" is cut short ({size} bytes, {end} are needed); '
            "copy it again"
        )
    return file


def _sha256(path: Path, external: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in (path, *external):
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
