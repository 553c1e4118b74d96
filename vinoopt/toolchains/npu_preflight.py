"""What the NPU compiler is known to refuse or to do badly, found before it is called.

The tables come from compiling one small network per operator and number format with the compiler of OpenVINO
2026.4 for platforms 3720, 4000 and 5010. What is not in them goes to the compiler, whose word is final.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from vinoopt.errors import ModelError, ToolchainRefused
from vinoopt.frontend.shapes import require_static, spec_shape
from vinoopt.records import Device, Diagnostic, TensorSpec

NEWEST_OPSET = 17
"""The newest set of operators that the compiler reads."""
_GROUPED_RANK = 3
"""Of a matrix of weights in groups; a convolution's weights have four or five dimensions."""
MAX_PORT_RANK = 5
"""Inside the graph more dimensions compile; at its inputs and outputs they do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """An operator that the compiler refuses, and what to do about it."""

    fix: str
    platforms: frozenset[str] | None = None
    """None: all."""
    applies: Callable[[ov.Node], bool] = lambda node: True


def _has(attribute: str, *values: object) -> Callable[[ov.Node], bool]:
    """Whether a node's attribute has one of the values."""
    return lambda node: node.get_attributes().get(attribute) in values


_ON_CPU = "cut the network before it and run the rest on the CPU"
_BOXES = "end the network at boxes and scores and select boxes on the CPU"

_UNROLL = "export the network with the steps unrolled, or with LSTM or GRU layers"

OPERATORS: dict[str, Refused] = {
    "AvgPool": Refused(
        fix="pool with rounding floor or ceil", applies=_has("rounding_type", "ceil_torch", "CEIL_TORCH")
    ),
    "BinaryConvolution": Refused(fix="use an ordinary convolution"),
    "Bucketize": Refused(fix="let it give i32 indices", applies=_has("output_type", "i64")),
    "Col2Im": Refused(fix=_ON_CPU),
    "DeformableConvolution": Refused(fix="use an ordinary convolution, or " + _ON_CPU),
    "EmbeddingBagOffsets": Refused(fix="use Gather and ReduceSum"),
    "EmbeddingBagPacked": Refused(fix="use Gather and ReduceSum"),
    "GRUCell": Refused(
        fix="set linear_before_reset, or use a GRU layer", applies=_has("linear_before_reset", False)
    ),
    "If": Refused(fix="export one branch, with the condition as a constant"),
    "Interpolate": Refused(
        fix="resize with mode linear, cubic or nearest",
        applies=_has("mode", "bilinear_pillow", "bicubic_pillow"),
    ),
    "MatrixNms": Refused(fix=_BOXES),
    "MulticlassNms": Refused(fix=_BOXES),
    "Multinomial": Refused(fix=_ON_CPU),
    "RNNCell": Refused(fix=_UNROLL),
    "RNNSequence": Refused(fix=_UNROLL),
    "ScatterNDUpdate": Refused(
        fix="let it replace values, without a reduction",
        applies=_has("reduction", "sum", "sub", "prod", "min", "max"),
    ),
    "SearchSorted": Refused(fix=_ON_CPU),
    "SegmentMax": Refused(fix=_ON_CPU),
    "SliceScatter": Refused(fix="use Concat or ScatterUpdate"),
    "Tan": Refused(fix="use Sin divided by Cos", platforms=frozenset({"3720", "4000"})),
    "Unique": Refused(fix=_ON_CPU),
}

_F8 = ("f8e4m3", "f8e5m2")
INPUT_FORMATS: dict[str, frozenset[str] | None] = {
    **dict.fromkeys(("u32", "u64")),
    **dict.fromkeys(_F8, frozenset({"3720", "4000"})),
}
"""Element type that no input may have -> platforms that refuse it, None for all."""
OUTPUT_FORMATS: dict[str, frozenset[str] | None] = {
    **dict.fromkeys(("i16", "u16", "u32", "u64", "i4", "u4", *_F8)),
    **dict.fromkeys(("f64", "bf16"), frozenset({"3720"})),
}
CONSTANT_FORMATS: dict[str, frozenset[str] | None] = dict.fromkeys(("nf4", "u2"), frozenset({"3720"}))
"""Element type of weights -> platforms that refuse it."""


def read_ir(model_path: Path) -> ov.Model:
    """The model in an IR; raises `ModelError` where OpenVINO cannot read it."""
    try:
        return ov.Core().read_model(model_path)
    except RuntimeError as exc:
        lines = [line for line in str(exc).splitlines() if line.strip()]
        raise ModelError(f"{model_path}: OpenVINO cannot read this IR: {lines[-1].strip()}") from exc


def check(model: ov.Model, platform: str, *, newest_opset: int = NEWEST_OPSET) -> tuple[Diagnostic, ...]:
    """Everything known to stand in the way (`error`) or to cost much (`warning`), layer by layer.

    Raises `ShapeError` for open dimensions of the inputs, with the `--shape` that fixes them: with those the
    compiler crashes rather than refuses, and nothing else can be judged.
    """
    require_static(tuple(_spec(port) for port in model.inputs), device=Device.NPU)
    found = [*_ports(model, platform)]
    for node in model.get_ordered_ops():
        found += _opset(node, newest_opset)
        found += _operator(node, platform)
        found += _constant(node, platform)
        found += _zero_points(node)
    return tuple(found)


def refuse(findings: Iterable[Diagnostic]) -> None:
    """Raise `ToolchainRefused` with every error among the findings."""
    errors = [each.message for each in findings if each.severity == "error"]
    if errors:
        raise ToolchainRefused("the NPU compiler would refuse this model: " + "; ".join(errors))


def _spec(port: ov.Output) -> TensorSpec:
    return TensorSpec(
        name=_port_name(port),
        shape=spec_shape(port.get_partial_shape()),
        dtype=port.get_element_type().get_type_name(),
    )


def _port_name(port: ov.Output) -> str:
    return str(port.get_any_name() if port.get_names() else port.get_node().get_friendly_name())


def _error(code: str, message: str, layer: str) -> Diagnostic:
    return Diagnostic(severity="error", code=code, message=message, layer=layer)


def _ports(model: ov.Model, platform: str) -> Iterable[Diagnostic]:
    for word, ports, formats in (
        ("input", model.inputs, INPUT_FORMATS),
        ("output", model.outputs, OUTPUT_FORMATS),
    ):
        for port in ports:
            name, rank = _port_name(port), port.get_partial_shape().rank
            if rank.is_static and rank.get_length() > MAX_PORT_RANK:
                yield _error(
                    "NPU_RANK",
                    f'{word} "{name}" has {rank.get_length()} dimensions; an NPU takes at most {MAX_PORT_RANK}: '
                    "merge some of them outside the network",
                    name,
                )
            element = port.get_element_type().get_type_name()
            if _holds(formats, element, platform):
                yield _error(
                    "NPU_FORMAT",
                    f'{word} "{name}" is {element}, which NPU {platform} cannot convert: '
                    "use f32, f16, i32, u8 or i8",
                    name,
                )


def _holds(table: dict[str, frozenset[str] | None], key: str, platform: str) -> bool:
    platforms = table.get(key, frozenset())
    return platforms is None or platform in platforms


def _opset(node: ov.Node, newest: int) -> Iterable[Diagnostic]:
    version = str(node.get_type_info().version_id)
    number = version.removeprefix("opset")
    if number != version and number.isdigit() and int(number) > newest:
        name = node.get_friendly_name()
        message = (
            f'layer "{name}": {node.get_type_name()} is of {version}, and the NPU compiler reads up to '
            f"opset{newest}: export the network with an older opset, or " + _ON_CPU
        )
        yield _error("NPU_OPSET", message, name)


def _operator(node: ov.Node, platform: str) -> Iterable[Diagnostic]:
    name, kind = node.get_friendly_name(), node.get_type_name()
    refused = OPERATORS.get(kind)
    if refused is None or (refused.platforms is not None and platform not in refused.platforms):
        return
    if refused.applies(node):
        message = f'layer "{name}": the compiler for NPU {platform} has no {kind} of this form: {refused.fix}'
        yield _error("NPU_OPERATOR", message, name)


def _constant(node: ov.Node, platform: str) -> Iterable[Diagnostic]:
    if node.get_type_name() != "Constant":
        return
    element = node.get_output_element_type(0).get_type_name()
    if _holds(CONSTANT_FORMATS, element, platform):
        name = node.get_friendly_name()
        yield _error(
            "NPU_FORMAT",
            f'weights "{name}" are {element}, which NPU {platform} does not know: compress them to int4 or int8',
            name,
        )


def _zero_points(node: ov.Node) -> Iterable[Diagnostic]:
    """Weight compression with zero points: they compile, but are subtracted in every inference."""
    if node.get_type_name() != "Subtract":
        return
    weights = _behind_convert(node, 0)
    if weights is None or _behind_convert(node, 1) is None:
        return
    element, name = weights.get_output_element_type(0).get_type_name(), weights.get_friendly_name()
    if element not in ("u4", "i4", "u8", "i8", "u2", "nf4"):
        return
    shape = weights.get_output_shape(0)
    groups = "per group" if len(shape) == _GROUPED_RANK and shape[-2] > 1 else "per channel"
    yield Diagnostic(
        severity="warning",
        code="NPU_ASYMMETRIC_WEIGHTS",
        message=(
            f'weights "{name}" are {element} with zero points {groups}, which an NPU subtracts anew in every '
            "inference (a small matrix product took 1.7 times as long per channel, 2.4 times per group), and over "
            "which compilers of other releases were reported to abort: compress symmetrically, mode int4_sym or "
            "int8_sym"
        ),
        layer=name,
    )


def _behind_convert(node: ov.Node, port: int) -> ov.Node | None:
    """The constant that feeds a port, directly or through Convert."""
    source = node.input_value(port).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "Constant" else None
