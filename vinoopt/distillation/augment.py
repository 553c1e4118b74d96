"""Images turned into other images that the teacher can be asked about: mirrored, shifted, mixed.

Student and teacher see the same altered image, so no label is ever wrong. Mixing two images makes inputs that no
photograph shows, on which a function is matched all the same (Beyer et al. 2021, arXiv 2106.05237: consistent and
patient teaching; mixup, Zhang et al. 2018, arXiv 1710.09412).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

_SMALLEST = 16
"""Pixels along a side below which a tensor is not taken for an image."""
_SHIFT = 8
"""Shifts go up to one part in so many of a side."""
_MIXED = 0.25
"""Share of the batches whose images are mixed with each other."""


class Augment(Protocol):
    """Inputs of one batch, first axis the samples, to altered ones; all chance comes from the generator."""

    def __call__(self, inputs: Sequence[Any], generator: Any) -> list[Any]:
        """The altered inputs."""
        ...


def image_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """Height and width axes of an input that is a batch of images with 1 or 3 channels; None for any other."""
    if len(shape) != 4:
        return None
    for channel, axes in ((1, (2, 3)), (3, (1, 2))):
        if shape[channel] in (1, 3) and all(shape[axis] >= _SMALLEST for axis in axes):
            return axes
    return None


def find_augment(call: Sequence[Any], *, mixes: bool = True) -> Augment | None:
    """The augmentation for a model's inputs, from one call; None where it is not an image, or not surely one.

    One channel of floats may as well be a spectrogram, which neither mirrored nor shifted is one.
    """
    if len(call) != 1:
        return None
    (x,) = call
    axes = image_axes(x.shape)
    if axes is None or (x.is_floating_point() and 3 not in (x.shape[1], x.shape[3])):
        return None
    return ImageAugment(axes, mixes=mixes)


class ImageAugment:
    """Mirror, shift and mix the images of a batch."""

    def __init__(self, axes: tuple[int, int], *, mixes: bool = True) -> None:
        self.axes = axes
        self.mixes = mixes
        """False where labels are learned too, which a mixed image has two of."""

    def __call__(self, inputs: Sequence[Any], generator: Any) -> list[Any]:
        """Floats in the range of the images; whole numbers become floats."""
        (x,) = inputs
        x = self._mirrored(x.to(torch.float32), generator)
        x = self._shifted(x, generator)
        if self.mixes and float(torch.rand((), generator=generator)) < _MIXED:
            x = self._mixed(x, generator)
        return [x]

    def _mirrored(self, x: Any, generator: Any) -> Any:
        flips = torch.rand(x.shape[0], generator=generator) < 0.5
        return torch.where(flips.reshape(-1, 1, 1, 1).to(x.device), x.flip(self.axes[1]), x)

    def _shifted(self, x: Any, generator: Any) -> Any:
        """Each image by its own number of pixels; its edges are repeated."""
        for axis in self.axes:
            size = x.shape[axis]
            most = max(size // _SHIFT, 1)
            shifts = torch.randint(-most, most + 1, (x.shape[0], 1), generator=generator)
            places = (torch.arange(size)[None] + shifts).clamp(0, size - 1)
            shape = [1] * x.ndim
            shape[0], shape[axis] = places.shape
            x = torch.gather(x, axis, places.reshape(shape).expand(x.shape).to(x.device))
        return x

    def _mixed(self, x: Any, generator: Any) -> Any:
        order = torch.randperm(x.shape[0], generator=generator).to(x.device)
        share = torch.rand((x.shape[0], 1, 1, 1), generator=generator).to(x.device)
        return share * x + (1 - share) * x[order]
