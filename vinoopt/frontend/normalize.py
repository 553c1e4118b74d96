"""From an ONNX file to the form that everything above works on: a folded float32 OpenVINO graph.

Preprocessing is embedded, shapes are applied, half-precision and double graphs compute in float32 behind
the types the user knows, batch norms are folded, and every node has a name of its own that is the
same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openvino as ov
from onnx import ModelProto
from onnx.defs import onnx_opset_version
from openvino import opset13 as ops
from openvino._offline_transformations import apply_moc_transformations
from openvino.preprocess import PrePostProcessor

from vinoopt.errors import ModelError, UnsupportedModelError
from vinoopt.frontend import preprocess as images
from vinoopt.frontend import refusal, shapes
from vinoopt.frontend.grouped_weights import split_groups
from vinoopt.frontend.load import OnnxFile, load_onnx, names_in, read_proto
from vinoopt.frontend.names import assign_names, bodies
from vinoopt.frontend.rewrite import expandable, rewritten
from vinoopt.records import Device, PreprocessSpec, TensorSpec

OLDEST_TESTED_OPSET = 7
_FLOATS_TO_F32 = {ov.Type.f16: "float16", ov.Type.bf16: "bfloat16", ov.Type.f64: "float64"}
_NUMPY_NAMES = {
    ov.Type.f32: "float32",
    ov.Type.f16: "float16",
    ov.Type.bf16: "bfloat16",
    ov.Type.f64: "float64",
    ov.Type.boolean: "bool",
    ov.Type.f8e4m3: "float8_e4m3fn",
    ov.Type.f8e5m2: "float8_e5m2",
    ov.Type.f4e2m1: "float4_e2m1fn",
    **{getattr(ov.Type, f"i{bits}"): f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{getattr(ov.Type, f"u{bits}"): f"uint{bits}" for bits in (4, 8, 16, 32, 64)},
}
_AMBIGUOUS = "single static assignment"
"""A tensor with two producers: OpenVINO would take either."""
_TYPE_ATTRIBUTES = ("destination_type", "output_type")
_ATTENTION_WALK = frozenset(
    {
        "Add", "Subtract", "Multiply", "Divide", "Select", "Maximum", "Minimum", "Reshape", "Transpose",
        "Squeeze", "Unsqueeze", "Convert", "Clamp", "Concat", "Slice", "FakeQuantize", "Broadcast",
    }
)  # fmt: skip
_ATTENTION_DEPTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceModel:
    """A model ready for compression: what the user feeds and gets, and the graph between."""

    path: Path
    name: str
    sha256: str
    """Of the ONNX file and its external data."""
    model: ov.Model
    inputs: tuple[TensorSpec, ...]
    """As the user feeds them, after preprocessing was embedded."""
    outputs: tuple[TensorSpec, ...]
    quantized: str
    """Why it counts as already quantized; empty where it does not."""
    is_transformer: bool
    messages: tuple[str, ...]
    """What the user should know about how the file was read."""
    model_inputs: tuple[TensorSpec, ...]
    """As the ONNX file has them, with the shapes asked for."""
    preprocess: tuple[PreprocessSpec, ...]
    onnx: OnnxFile


def load_model(
    path: str | Path, *, shape: str | None = None, preprocess: Sequence[PreprocessSpec] = ()
) -> SourceModel:
    """The ONNX file at `path` as a normalised float32 OpenVINO model.

    `shape` is in benchmark_app's spelling (`"x[1,3,224,224],mask[1,?]"`) and is about the inputs of the
    ONNX file. Raises `ModelError` where the file cannot be read, `UnsupportedModelError` where OpenVINO lacks
    something it needs, `ShapeError` and `PreprocessError` where those do not fit the model.
    """
    onnx = load_onnx(Path(path))
    model, names = _read(onnx)
    if shape is not None:
        shapes.apply_shapes(model, shape, onnx.inputs)
    model_inputs = _specs(model.inputs, onnx.inputs)
    resolved = images.resolve(preprocess, model_inputs)
    by_index = {i: resolved[spec.name] for i, spec in enumerate(model_inputs) if spec.name in resolved}

    model, inner = _folded(model, by_index, model_inputs=model_inputs, onnx=onnx)
    assign_names(model, names, inputs=onnx.inputs, outputs=onnx.outputs)

    inputs = tuple(
        spec.model_copy(update={"layout": by_index[i].image_layout}) if i in by_index else spec
        for i, spec in enumerate(_specs(model.inputs, onnx.inputs))
    )
    return SourceModel(
        path=onnx.path,
        name=onnx.path.stem,
        sha256=onnx.sha256,
        model=model,
        inputs=inputs,
        outputs=_specs(model.outputs, onnx.outputs),
        quantized=onnx.quantized,
        is_transformer=is_transformer(model),
        messages=tuple(_messages(onnx, inner, inputs)),
        model_inputs=model_inputs,
        preprocess=tuple(preprocess),
        onnx=onnx,
    )


def _folded(
    model: ov.Model,
    with_images: dict[int, PreprocessSpec],
    *,
    model_inputs: tuple[TensorSpec, ...],
    onnx: OnnxFile,
) -> tuple[ov.Model, list[str]]:
    """The simplified float32 graph with images at its door, and the other float formats it had."""
    try:
        inner = sorted(compute_in_f32(model))
        model = images.embed(model, with_images)
        model = _restore_door(model, with_images, model_inputs, onnx.outputs)
        apply_moc_transformations(model, cf=True)
        split_groups(model)
    except RuntimeError as exc:
        told = refusal.cause(str(exc))
        raise UnsupportedModelError(f"{onnx.path}: OpenVINO cannot simplify the graph: {told}") from exc
    return model, inner


def require_static(source: SourceModel, device: Device) -> None:
    """Raise `ShapeError` where an input of `source` is open; the message names the flag that fixes it."""
    shapes.require_static(source.model_inputs, device=device, shown=source.path.name)


def _read(onnx: OnnxFile) -> tuple[ov.Model, frozenset[str]]:
    """The graph, its weights mapped from disk where the file is read as it is, and the names in it."""
    proto = rewritten(onnx)
    try:
        model = _parse(onnx, proto)
    except RuntimeError as exc:
        refused = proto or read_proto(onnx.path)
        error = refusal.explain(onnx.path, refused, reason=str(exc), complaint=onnx.complaint)
        simpler = expandable(refusal.failed_nodes(refused, str(exc)), onnx.opset)
        if not simpler:
            raise error from exc
        try:
            proto = rewritten(onnx, simpler)
            model = _parse(onnx, proto)
        except (RuntimeError, UnsupportedModelError):  # what was refused first is what the user knows
            raise error from exc
    if onnx.complaint and (_AMBIGUOUS in onnx.complaint or len(model.inputs) > len(onnx.inputs)):
        raise ModelError(f"{onnx.path}: not valid ONNX: {onnx.complaint}; export the model again")
    return _with_empty_inputs(model, onnx), onnx.names if proto is None else names_in(proto)


def _parse(onnx: OnnxFile, proto: ModelProto | None) -> ov.Model:
    """The one place where OpenVINO reads a model."""
    return ov.Core().read_model(str(onnx.path) if proto is None else proto.SerializeToString())


def _with_empty_inputs(model: ov.Model, onnx: OnnxFile) -> ov.Model:
    """`model` with the inputs of no elements, which OpenVINO takes for constants, and in the file's order."""
    read = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
    is_same = [spec.name for spec in onnx.inputs] == list(read)
    if is_same and len(model.get_results()) == len(onnx.outputs):
        return model
    types = {name: kind for kind, name in _NUMPY_NAMES.items()}
    parameters = []
    for spec in onnx.inputs:
        if spec.name in read:
            parameters.append(read[spec.name])
        elif 0 in spec.shape and spec.dtype in types:
            parameters.append(ops.parameter(list(spec.shape), types[spec.dtype], name=spec.name))
            parameters[-1].output(0).get_tensor().set_names({spec.name})
    if len(parameters) != len(onnx.inputs) or len(model.get_results()) != len(onnx.outputs):
        raise UnsupportedModelError(
            f"{onnx.path}: OpenVINO reads {len(model.inputs)} inputs, {len(model.outputs)} outputs where "
            f"the file has {len(onnx.inputs)} and {len(onnx.outputs)}; remove what is named twice"
        )
    return ov.Model(model.get_results(), model.get_sinks(), parameters, model.get_friendly_name())


def _messages(onnx: OnnxFile, inner: list[str], inputs: tuple[TensorSpec, ...]) -> Iterator[str]:
    if onnx.complaint:
        yield f"onnx.checker: {onnx.complaint}; OpenVINO reads the model all the same"
    if 0 < onnx.opset < OLDEST_TESTED_OPSET:
        yield (
            f"opset {onnx.opset} is older than {OLDEST_TESTED_OPSET}, the oldest that OpenVINO and ONNX Runtime test"
        )
    if onnx.opset > onnx_opset_version():
        yield f"opset {onnx.opset} is newer than {onnx_opset_version()}, the newest that is known here"
    if onnx.quantized:
        yield f"already quantized ({onnx.quantized}): taken as it is"
    if inner:
        yield f"the model computes in {' and '.join(inner)}: float32 inside, the same types at the door"
    open_inputs = [spec.name for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)]
    if open_inputs:
        yield f"open dimensions in {', '.join(open_inputs)}: kept; --shape fixes them"


def _specs(ports: Sequence[ov.Output], named: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=spec.name,
            shape=shapes.spec_shape(port.get_partial_shape()),
            dtype=_NUMPY_NAMES.get(port.get_element_type(), port.get_element_type().get_type_name()),
        )
        for port, spec in zip(ports, named, strict=True)
    )


# --------------------------------------------------------------------------- number formats


def compute_in_f32(model: ov.Model) -> set[str]:
    """Turn half-precision and double tensors of `model` into float32, in place; the formats that were found.

    Pruning and quantization then see plain float32 weights, and no value is rounded twice.
    """
    found = _subgraph_in_f32(model)
    if found:
        model.validate_nodes_and_infer_types()
    return found


def _subgraph_in_f32(model: ov.Model) -> set[str]:
    found: set[str] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_element_type() in _FLOATS_TO_F32:
            found.add(_FLOATS_TO_F32[node.get_element_type()])
            _constant_in_f32(node)
        elif kind == "Parameter" and node.get_element_type() in _FLOATS_TO_F32:
            found.add(_FLOATS_TO_F32[node.get_element_type()])
            node.set_element_type(ov.Type.f32)
        else:
            found |= _attributes_in_f32(node)
        for body in bodies(node):
            found |= _subgraph_in_f32(body)
    return found


def _constant_in_f32(node: ov.Node) -> None:
    folded = ops.constant(node.get_data(dtype="float32"), ov.Type.f32)
    folded.set_friendly_name(node.get_friendly_name())
    names = node.output(0).get_names()
    node.output(0).replace(folded.output(0))
    folded.output(0).get_tensor().set_names(names)


def _attributes_in_f32(node: ov.Node) -> set[str]:
    found = set()
    attributes = node.get_attributes()
    for key in _TYPE_ATTRIBUTES:
        kind = next((t for t in _FLOATS_TO_F32 if attributes.get(key) == t.get_type_name()), None)
        if kind is not None:
            found.add(_FLOATS_TO_F32[kind])
            node.set_attribute(key, "f32")
    return found


def _restore_door(
    model: ov.Model,
    with_images: dict[int, PreprocessSpec],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> ov.Model:
    """Give inputs and outputs the types that the ONNX file has."""
    types = {name: kind for kind, name in _FLOATS_TO_F32.items()}
    processor = PrePostProcessor(model)
    changed = False
    for index, spec in enumerate(inputs):
        if index not in with_images and spec.dtype in types:
            processor.input(index).tensor().set_element_type(types[spec.dtype])
            changed = True
    for index, spec in enumerate(outputs):
        if spec.dtype in types and model.output(index).get_element_type() == ov.Type.f32:
            processor.output(index).tensor().set_element_type(types[spec.dtype])
            changed = True
    return processor.build() if changed else model


# --------------------------------------------------------------------------- what kind of model


def is_transformer(model: ov.Model) -> bool:
    """Whether the graph has attention (MatMul, Softmax, MatMul over activations) and layer normalisation."""
    nodes = model.get_ordered_ops()
    kinds = {node.get_type_name() for node in nodes}
    has_norm = bool(kinds & {"MVN", "RMS", "RMSNorm"}) or _has_decomposed_norm(nodes)
    if not has_norm:
        return False
    return "ScaledDotProductAttention" in kinds or any(
        node.get_type_name() == "Softmax"
        and _reaches_product(_producers(node), _producers)
        and _reaches_product(_consumers(node), _consumers)
        for node in nodes
    )


def _has_decomposed_norm(nodes: list[ov.Node]) -> bool:
    """A Sqrt or Power of a mean that divides an activation, as LayerNorm and RMSNorm decompose."""
    return any(
        node.get_type_name() == "ReduceMean" and _leads_to(node, {"Sqrt", "Power"}, 3) for node in nodes
    )


def _leads_to(node: ov.Node, kinds: set[str], depth: int) -> bool:
    if depth == 0:
        return False
    for consumer in _consumers(node):
        kind = consumer.get_type_name()
        if kind in kinds or (kind in ("Add", "Maximum") and _leads_to(consumer, kinds, depth - 1)):
            return True
    return False


def _is_product_of_activations(node: ov.Node) -> bool:
    return node.get_type_name() == "MatMul" and not any(
        value.get_node().get_type_name() == "Constant" for value in node.input_values()
    )


def _reaches_product(start: list[ov.Node], step: Callable[[ov.Node], list[ov.Node]]) -> bool:
    """Whether `step` leads from `start` to a product of activations through scaling, masks and reshapes only."""
    seen: set[str] = set()
    frontier = start
    for _ in range(_ATTENTION_DEPTH + 1):
        if any(_is_product_of_activations(node) for node in frontier):
            return True
        seen.update(node.get_name() for node in frontier)
        reached = [
            each for node in frontier if node.get_type_name() in _ATTENTION_WALK for each in step(node)
        ]
        frontier = list({node.get_name(): node for node in reached if node.get_name() not in seen}.values())
    return False


def _producers(node: ov.Node) -> list[ov.Node]:
    return [value.get_node() for value in node.input_values()]


def _consumers(node: ov.Node) -> list[ov.Node]:
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
