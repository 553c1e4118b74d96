"""What is settled before PyTorch is imported: whether it is here, how fast to go, and in what steps."""

from __future__ import annotations

import openvino as ov

from vinoopt.accuracy.datasets import Dataset
from vinoopt.compression.activations import in_order, sized_like
from vinoopt.cost_model import layer_costs
from vinoopt.errors import ExtraMissing, ShapeError

PRUNED_RATE, ROUNDED_RATE = 0.01, 1e-4
"""Peak rates: weights that make up for removed channels have a way to go; those that were only rounded are near."""
_FEW, _MANY = 16, 64
"""Samples of one step."""
_HEAVY = 3_000_000
"""Elements that one sample moves through the layers, from which on a step has few samples, so that there are enough
steps: a network for small images moves less than a million, one for photographs ten."""


def usual_batch(model: ov.Model, data: Dataset) -> int:
    """Samples of one step where nothing else is asked for; `data` gives whole calls of `model`."""
    try:
        costs = layer_costs(sized_like(model, in_order(model, data[0])))
    except ShapeError:  # some hang on the values of the inputs
        return _MANY
    moved = sum(layer.activations for layer in costs)
    return _FEW if moved / data.batch >= _HEAVY else _MANY


def require_torch() -> None:
    """Raises `ExtraMissing`, which says how to install PyTorch, where it cannot be imported."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as exc:
        raise ExtraMissing(
            "distillation needs PyTorch, which is not installed: pip install 'vinoopt[distill]' (its CPU build is "
            "enough), or choose another effort"
        ) from exc
    except (ImportError, OSError) as exc:
        raise ExtraMissing(
            f"distillation needs PyTorch, which is here but cannot be imported ({exc}): install its CPU build, "
            "or choose another effort"
        ) from exc
