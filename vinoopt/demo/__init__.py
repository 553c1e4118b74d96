"""A real model and real images, so that the main job runs on a fresh machine.

`digits.onnx` is a small residual network for handwritten digits, trained on one half of the UCI "Optical
Recognition of Handwritten Digits" test set (E. Alpaydin, C. Kaynak; CC BY 4.0); `digits.npz` holds the other
half, which training never saw: `images` uint8 [N,32,32,1] and `labels` int64 [N].
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vinoopt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Paths of the demo's model, of its images with labels, and of the preprocessing between the two."""

    model: Path
    data: Path
    preprocess: Path


def demo_files() -> DemoFiles:
    """Where the demo lies in the installed package; `InputError` where that is not unpacked on disk."""
    folder = resources.files(__name__)
    if not isinstance(folder, Path):
        raise InputError("the demo needs vinoopt installed as files; this package is read from an archive")
    return DemoFiles(
        model=folder / "digits.onnx", data=folder / "digits.npz", preprocess=folder / "preprocess.toml"
    )
