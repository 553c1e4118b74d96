"""What is settled before PyTorch is imported: whether it is here, how fast to go, and in what steps."""

from __future__ import annotations

from vinoopt.accuracy.datasets import Dataset
from vinoopt.errors import ExtraMissing

PRUNED_RATE, ROUNDED_RATE = 0.01, 3e-4
"""Peak rates: weights that make up for removed channels have a way to go; those that were only rounded are near."""
_LARGE = 3 * 96 * 96
"""Values of one sample's inputs from which on a step has fewer samples, so that there are enough steps."""


def usual_batch(data: Dataset) -> int:
    """Samples of one step where nothing else is asked for."""
    size = sum(array.size for array in data[0].values()) / data.batch
    return 16 if size >= _LARGE else 64


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
