"""Whether PyTorch is here, asked before any long work."""

from __future__ import annotations

import importlib.util
import sys

from vinoopt.errors import ExtraMissing


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
