"""What is settled before PyTorch is imported: whether it is here, and how fast to go."""

from __future__ import annotations

import importlib.util
import sys

from vinoopt.errors import ExtraMissing

PRUNED_RATE, ROUNDED_RATE = 0.01, 3e-4
"""Peak rates: weights that make up for removed channels have a way to go; those that were only rounded are near."""


def require_torch() -> None:
    """Raises `ExtraMissing`, which says how to install PyTorch, where it cannot be imported."""
    if "torch" in sys.modules:
        is_here = sys.modules["torch"] is not None
    else:
        is_here = importlib.util.find_spec("torch") is not None
    if not is_here:
        raise ExtraMissing(
            "distillation needs PyTorch, which is not installed: pip install 'vinoopt[distill]' (its CPU build is "
            "enough), or choose another effort"
        )
