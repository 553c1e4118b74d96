"""Image files as calls of a model: decoded, turned upright, brought to the size that is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vinoopt.accuracy.arrays import Array, Sample, admits, batch_size, shape_text
from vinoopt.errors import DataError
from vinoopt.records import PreprocessSpec, TensorSpec

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""Values of the EXIF orientation tag that swap width and height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where an image lies in what is fed: `fed = original * scale + offset`, in pixels."""

    original: tuple[int, int]
    """Height and width of the upright image."""
    fed: tuple[int, int]
    scale: tuple[float, float]
    """Along height and width."""
    offset: tuple[int, int] = (0, 0)

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width after the resize, before crop or padding."""
        return (
            max(1, round(self.original[0] * self.scale[0])),
            max(1, round(self.original[1] * self.scale[1])),
        )


def _squash(original: tuple[int, int], fed: tuple[int, int]) -> Placement:
    return Placement(original=original, fed=fed, scale=(fed[0] / original[0], fed[1] / original[1]))


def _crop(original: tuple[int, int], fed: tuple[int, int]) -> Placement:
    scale = max(fed[0] / original[0], fed[1] / original[1])
    placed = Placement(original=original, fed=fed, scale=(scale, scale))
    rows, columns = placed.resized
    return Placement(
        original=original,
        fed=fed,
        scale=(scale, scale),
        offset=(-((rows - fed[0]) // 2), -((columns - fed[1]) // 2)),
    )


def _letterbox(original: tuple[int, int], fed: tuple[int, int]) -> Placement:
    scale = min(fed[0] / original[0], fed[1] / original[1])
    return Placement(original=original, fed=fed, scale=(scale, scale))


FITS: dict[str, Callable[[tuple[int, int], tuple[int, int]], Placement]] = {
    "squash": _squash,
    "crop": _crop,
    "letterbox": _letterbox,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageReader:
    """Calls from image files, decoded when they are asked for."""

    root: Path
    files: tuple[Path, ...]
    spec: TensorSpec
    size: tuple[int, int]
    is_nhwc: bool
    preprocess: PreprocessSpec
    batch: int
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files) // self.batch

    def __getitem__(self, index: int) -> Sample:
        files = self.files[index * self.batch : (index + 1) * self.batch]
        images = np.stack([self._decode(path) for path in files])
        values = images if self.is_nhwc else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return {self.spec.name: values.astype(self.spec.dtype, copy=False)}

    def placement(self, number: int) -> Placement:
        """Where the image of this file number lies in what is fed; reads its header only."""
        return FITS[self.preprocess.fit](image_size(self.files[number]), self.size)

    def _decode(self, path: Path) -> Array:
        channels = self.spec.shape[3 if self.is_nhwc else 1]
        try:
            with Image.open(path) as stored:
                image = ImageOps.exif_transpose(stored).convert("L" if channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as exc:
            raise DataError(f"{path}: cannot be decoded: {exc}; repair it or leave it out") from exc
        place = FITS[self.preprocess.fit]((image.height, image.width), self.size)
        return _placed(image, place, self.preprocess.pad_value)


def _placed(image: Image.Image, place: Placement, pad_value: float) -> Array:
    """The image as uint8 [H, W, C] of the size that is fed."""
    rows, columns = place.resized
    if (rows, columns) != (image.height, image.width):
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    top, left = -place.offset[0], -place.offset[1]
    pixels = pixels[top : top + place.fed[0], left : left + place.fed[1]]
    if pixels.shape[:2] == place.fed:
        return pixels
    fed = np.full((*place.fed, pixels.shape[2]), pad_value, dtype=np.uint8)
    fed[: pixels.shape[0], : pixels.shape[1]] = pixels
    return fed


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header; `DataError` where it is no image."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as exc:
        raise DataError(f"{path}: not an image that can be read: {exc}; repair it or leave it out") from exc
    return (width, height) if sideways else (height, width)


def image_reader(
    root: Path, files: Sequence[Path], inputs: Sequence[TensorSpec], preprocess: Sequence[PreprocessSpec]
) -> ImageReader:
    """Calls from image files for a model with one image input.

    Raises `DataError` where the input takes no images, where the size is open, or where the model expects
    normalised floats and no preprocessing is embedded.
    """
    if len(inputs) != 1:
        raise DataError(
            f"{root}: a folder of images feeds one input, the model has {len(inputs)}; use npz files"
        )
    spec = inputs[0]
    chosen = next((p for p in preprocess if p.input in (None, spec.name)), None)
    is_nhwc = _is_nhwc(spec, root)
    if np.dtype(spec.dtype) != np.uint8 and chosen is None:
        raise DataError(
            f'{root}: input "{spec.name}" takes {spec.dtype} {shape_text(spec.shape)}, and how images become '
            "such numbers is not known; give --mean and --scale (and --colour-order BGR where it applies) to "
            "embed the preprocessing, with --mean 0 --scale 1 for a model that takes 0 to 255, "
            "or store ready arrays as npz"
        )
    chosen = chosen or PreprocessSpec()
    if chosen.fit not in FITS:
        raise DataError(f'fit "{chosen.fit}" is not one of {", ".join(FITS)}')
    size = _fed_size(spec, is_nhwc, chosen, root)
    for path in files:
        image_size(path)
    batch = batch_size(spec)
    left = len(files) % batch
    return ImageReader(
        root=root,
        files=tuple(files),
        spec=spec,
        size=size,
        is_nhwc=is_nhwc,
        preprocess=chosen,
        batch=batch,
        messages=(f"the last {left} images do not fill a batch and are left out",) if left else (),
    )


def _is_nhwc(spec: TensorSpec, root: Path) -> bool:
    if spec.layout in ("NHWC", "NCHW") and len(spec.shape) == 4:
        return spec.layout == "NHWC"
    if len(spec.shape) == 4 and (spec.shape[3] in (1, 3)) != (spec.shape[1] in (1, 3)):
        return spec.shape[3] in (1, 3)
    raise DataError(
        f'{root}: images cannot feed input "{spec.name}" {shape_text(spec.shape)}; '
        "an image input has 4 axes with 1 or 3 channels"
    )


def _fed_size(spec: TensorSpec, is_nhwc: bool, chosen: PreprocessSpec, root: Path) -> tuple[int, int]:
    rows, columns = spec.shape[1:3] if is_nhwc else spec.shape[2:4]
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    if chosen.image_size is None:
        raise DataError(
            f'{root}: input "{spec.name}" leaves its size open {shape_text(spec.shape)}; '
            "fix it with --shape, or give --image-size"
        )
    if not (admits(rows, chosen.image_size[0]) and admits(columns, chosen.image_size[1])):
        raise DataError(
            f'image size {chosen.image_size} does not fit input "{spec.name}" {shape_text(spec.shape)}'
        )
    return chosen.image_size
