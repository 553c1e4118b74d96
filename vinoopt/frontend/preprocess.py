"""Preprocessing of image inputs, embedded into the graph: layout, colour order, mean, scale, resize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm

from vinoopt import serde
from vinoopt.errors import PreprocessError
from vinoopt.records import PreprocessSpec, TensorSpec

_RESIZE = {
    "linear": ResizeAlgorithm.RESIZE_LINEAR,
    "cubic": ResizeAlgorithm.RESIZE_CUBIC,
    "nearest": ResizeAlgorithm.RESIZE_NEAREST,
}
_FITS = ("squash", "crop", "letterbox")
_COLOURS = ("RGB", "BGR")


def read_preprocess(path: Path) -> tuple[PreprocessSpec, ...]:
    """The specs in a TOML file: a single table, or one `[[input]]` table per image input.

    Raises `PreprocessError` for an unknown key or value.
    """
    table = serde.read_toml(path, error=PreprocessError)
    if not isinstance(table.get("input"), list):
        tables = [table]
    elif set(table) != {"input"}:
        raise PreprocessError(
            f"{path}: keys beside the [[input]] tables belong to none of them: "
            f"{', '.join(sorted(set(table) - {'input'}))}"
        )
    else:
        tables = table["input"]
    specs = []
    for index, each in enumerate(tables):
        where = str(path) if len(tables) == 1 else f"{path}: input {index}"
        specs.append(serde.from_mapping(PreprocessSpec, _widened(each), where=where, error=PreprocessError))
    return tuple(specs)


def _widened(table: object) -> object:
    """One number stands for a tuple of one in `mean` and `scale`."""
    if not isinstance(table, dict):
        return table
    return {k: [v] if k in ("mean", "scale") and isinstance(v, int | float) else v for k, v in table.items()}


def resolve(specs: Sequence[PreprocessSpec], inputs: tuple[TensorSpec, ...]) -> dict[str, PreprocessSpec]:
    """Input name -> its spec, checked against the model's inputs; raises `PreprocessError`."""
    names = [spec.name for spec in inputs]
    by_name: dict[str, PreprocessSpec] = {}
    for spec in specs:
        if spec.input is None and len(names) != 1:
            raise PreprocessError(
                f"preprocessing: say which input it is for ({', '.join(names) or 'the model has none'})"
            )
        name = spec.input if spec.input is not None else names[0]
        if name not in names:
            raise PreprocessError(
                f'preprocessing: the model has no input "{name}"{serde.nearest(name, names)} '
                f"(inputs: {', '.join(names)})"
            )
        if name in by_name:
            raise PreprocessError(f'preprocessing: input "{name}" is named twice')
        _check(spec, inputs[names.index(name)])
        by_name[name] = spec
    return by_name


def _check(spec: PreprocessSpec, tensor: TensorSpec) -> None:
    where = f'preprocessing of input "{tensor.name}"'
    for word, choices, key in (
        (spec.colour_order, _COLOURS, "colour_order"),
        (spec.resize, tuple(_RESIZE), "resize"),
        (spec.fit, _FITS, "fit"),
    ):
        if word not in choices:
            raise PreprocessError(f'{where}: {key} "{word}" is none of {", ".join(choices)}')
    for layout, key in ((spec.image_layout, "image_layout"), (spec.model_layout, "model_layout")):
        if sorted(layout) not in (sorted("NHWC"), sorted("HWC")):
            raise PreprocessError(f'{where}: {key} "{layout}" is not made of N, H, W and C, as "NHWC"')
    if len(spec.image_layout) != len(spec.model_layout):
        raise PreprocessError(
            f'{where}: image_layout "{spec.image_layout}" and model_layout "{spec.model_layout}" differ in '
            "their number of dimensions"
        )
    _check_channels(spec, tensor, where)


def _check_channels(spec: PreprocessSpec, tensor: TensorSpec, where: str) -> None:
    shape = ",".join(str(dim) for dim in tensor.shape)
    if len(tensor.shape) != len(spec.model_layout):
        raise PreprocessError(
            f"{where}: its shape [{shape}] does not fit the layout {spec.model_layout}; preprocessing is for "
            "image inputs"
        )
    channels = tensor.shape[spec.model_layout.index("C")]
    if channels not in (1, 3):
        raise PreprocessError(
            f"{where}: its channel dimension in [{shape}] with the layout {spec.model_layout} is {channels}, "
            "not 3 or 1; set model_layout to the model's layout"
        )
    if spec.colour_order == "BGR" and channels == 1:
        raise PreprocessError(f"{where}: colour_order BGR needs 3 channels, it has 1")
    for values, key in ((spec.mean, "mean"), (spec.scale, "scale")):
        if len(values) not in (0, 1, channels):
            raise PreprocessError(f"{where}: {key} has {len(values)} values for {channels} channels")
    if 0 in spec.scale:
        raise PreprocessError(f"{where}: scale holds a zero, and the image is divided by it")
    if (spec.mean or spec.scale) and not tensor.dtype.startswith(("float", "bfloat")):
        raise PreprocessError(f"{where}: mean and scale make fractions, and the input takes {tensor.dtype}")
    if spec.image_size is None:
        return
    if min(spec.image_size) < 1:
        raise PreprocessError(f"{where}: image_size {spec.image_size} is not a height and width above 0")
    if any(isinstance(tensor.shape[spec.model_layout.index(axis)], str) for axis in "HW"):
        raise PreprocessError(
            f"{where}: image_size asks for a resize, but the model's height and width in [{shape}] are open; "
            "fix them with --shape"
        )


def embed(model: ov.Model, specs: dict[int, PreprocessSpec]) -> ov.Model:
    """`model` with u8 images at its inputs of the given indices, brought to what it was trained with.

    In this order: to float, resize, colour order, minus mean, divided by scale, to the model's layout.
    Changes `model`.
    """
    if not specs:
        return model
    processor = PrePostProcessor(model)
    for index, spec in specs.items():
        _embed_one(processor, model, index, spec)
    try:
        return processor.build()
    except RuntimeError as exc:
        lines = [line for line in str(exc).splitlines() if line.strip()]
        raise PreprocessError(f"the preprocessing does not fit the model: {lines[-1].strip()}") from exc


def _embed_one(processor: PrePostProcessor, model: ov.Model, index: int, spec: PreprocessSpec) -> None:
    port = model.input(index)
    channels = port.get_partial_shape()[spec.model_layout.index("C")].get_length()
    info = processor.input(index)
    tensor = info.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout(spec.image_layout))
    if channels == 3:
        tensor.set_color_format(ColorFormat.RGB)
    info.model().set_layout(ov.Layout(spec.model_layout))
    steps = info.preprocess()
    if port.get_element_type().is_real() or spec.image_size is not None:
        steps.convert_element_type(ov.Type.f32)
    if spec.image_size is not None:
        tensor.set_spatial_static_shape(*spec.image_size)
        steps.resize(_RESIZE[spec.resize])
    if spec.colour_order == "BGR":
        steps.convert_color(ColorFormat.BGR)
    if spec.mean:
        steps.mean(list(spec.mean) if len(spec.mean) > 1 else spec.mean[0])
    if spec.scale:
        steps.scale(list(spec.scale) if len(spec.scale) > 1 else spec.scale[0])
    if port.get_element_type() != ov.Type.f32:
        steps.convert_element_type(port.get_element_type())


# --------------------------------------------------------------------------- the same outside the graph


def compute(spec: PreprocessSpec, images: NDArray[Any], tensor: TensorSpec) -> NDArray[Any]:
    """What the model input `tensor` takes for `images` fed with `spec`, computed outside the graph.

    Written apart from `embed`, so that each checks the other; the resize alone is OpenVINO's too.
    """
    order = spec.image_layout
    axes = [order.index(axis) for axis in ("N" if "N" in order else "") + "HWC"]
    values = np.asarray(images, dtype=np.float32).transpose(axes)
    if spec.image_size is not None:
        size = [int(tensor.shape[spec.model_layout.index(axis)]) for axis in "HW"]
        values = _resized(values, size, spec.resize)
    if spec.colour_order == "BGR":
        values = values[..., ::-1]
    if spec.mean:
        values = values - np.asarray(spec.mean, dtype=np.float32)
    if spec.scale:
        values = values / np.asarray(spec.scale, dtype=np.float32)
    ordered = ("N" if "N" in order else "") + "HWC"
    values = values.transpose([ordered.index(axis) for axis in spec.model_layout])
    return np.ascontiguousarray(values.astype(tensor.dtype))


def _resized(values: NDArray[Any], size: list[int], mode: str) -> NDArray[Any]:
    """Height and width of ([N,] H, W, C) values brought to `size`, half-pixel centres, no antialiasing."""
    image = ops.parameter(list(values.shape), ov.Type.f32)
    axes = [values.ndim - 3, values.ndim - 2]
    modes = {"linear": "linear_onnx", "cubic": "cubic", "nearest": "nearest"}
    resized = ops.interpolate(
        image,
        ops.constant(np.array(size, dtype=np.int64)),
        modes[mode],
        "sizes",
        axes=ops.constant(np.array(axes, dtype=np.int64)),
    )
    model = ov.Model([resized], [image], "resize")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([values])[0])
