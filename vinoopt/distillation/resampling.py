"""Interpolation along one axis after another, in all of OpenVINO's coordinate systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openvino as ov
import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from vinoopt.distillation.rules import Function, refuse, rule, whole

_COORDINATES: dict[str, Callable[[Any, float, int, int], Any]] = {
    "half_pixel": lambda x, s, n, m: (x + 0.5) / s - 0.5,
    "pytorch_half_pixel": lambda x, s, n, m: (x + 0.5) / s - 0.5 if m > 1 else x * 0,
    "asymmetric": lambda x, s, n, m: x / s,
    "tf_half_pixel_for_nn": lambda x, s, n, m: (x + 0.5) / s,
    "align_corners": lambda x, s, n, m: x * ((n - 1) / (m - 1)) if m > 1 else x * 0,
}
"""Places in the output, scale, size of input and of output, to places in the input."""

_NEAREST: dict[str, Function] = {
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "simple": torch.floor,
}


@rule("Interpolate")
def _interpolate(node: ov.Node) -> Function:
    a = node.get_attributes()
    if node.get_type_info().version_id not in ("opset4", "opset11"):
        raise refuse(node, "the first version")
    if a["antialias"] or any(a["pads_begin"]) or any(a["pads_end"]):
        raise refuse(node, "antialiasing or padding")
    mode, by_size = str(a["mode"]), str(a["shape_calculation_mode"]) == "sizes"
    transform = _COORDINATES[str(a["coordinate_transformation_mode"])]
    nearest = str(a["nearest_mode"])
    if mode not in ("nearest", "linear", "linear_onnx", "cubic"):
        raise refuse(node, f"mode {mode}")
    is_old = node.get_type_info().version_id == "opset4"  # with both sizes and scales among its inputs

    def interpolate(x: Any, *rest: Any) -> Any:
        wanted = rest[0] if by_size or not is_old else rest[1]
        axes = whole(rest[2 if is_old else 1]) if len(rest) > (2 if is_old else 1) else list(range(x.ndim))
        for axis, value in zip(axes, wanted.reshape(-1).tolist(), strict=True):
            size = x.shape[axis]
            new = int(value) if by_size else int(size * value + 1e-5)
            scale = new / size if by_size else float(value)
            if new == size and scale == 1:
                continue
            places = transform(torch.arange(new, dtype=torch.float32), scale, size, new)
            if mode == "nearest":
                places = torch.ceil(places) if nearest == "simple" and scale < 1 else _NEAREST[nearest](places)
                x = x.index_select(axis, places.clamp(0, size - 1).long().to(x.device))
            else:
                weights = _cubic(places, size, float(a["cube_coeff"])) if mode == "cubic" else _linear(places, size)
                x = (x.movedim(axis, -1) @ weights.to(x.device)).movedim(-1, axis)
        return x

    return interpolate


@rule("GridSample")
def _grid_sample(node: ov.Node) -> Function:
    a = node.get_attributes()
    aligns, mode, padding = bool(a["align_corners"]), str(a["mode"]), str(a["padding_mode"])

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=aligns)

    return sample


def _linear(places: Any, size: int) -> Any:
    """[size, places] weights of each input value in each output value."""
    places = places.clamp(0, size - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=size - 1)
    weights = torch.zeros(size, len(places))
    columns = torch.arange(len(places))
    weights.index_put_((below, columns), 1 - (places - below), accumulate=True)
    weights.index_put_((above, columns), places - below, accumulate=True)
    return weights


def _cubic(places: Any, size: int, a: float) -> Any:
    below = places.floor()
    t = places - below
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (t + 1, 2 - t)]
    weights = torch.zeros(size, len(places))
    columns = torch.arange(len(places))
    for offset, values in zip((-1, 0, 1, 2), (far[0], near[0], near[1], far[1]), strict=True):
        rows = (below.long() + offset).clamp(0, size - 1)
        weights.index_put_((rows, columns), values, accumulate=True)
    return weights
