"""Input shapes in benchmark_app's spelling, applied to a model."""

from __future__ import annotations

import re

import openvino as ov

from vinoopt.errors import ShapeError
from vinoopt.records import Device, TensorSpec
from vinoopt.serde import nearest

_ITEM = re.compile(r"\s*[,;]?\s*(?P<name>[^\[\]]*?)\s*\[(?P<dims>[^\[\]]*)\]")
_INTERVAL = re.compile(r"(?P<low>\d*)\s*\.\.\s*(?P<high>\d*)")
_ENDLESS = 1 << 62

Interval = tuple[int, int]


def parse_shapes(text: str, inputs: tuple[TensorSpec, ...]) -> dict[str, tuple[Interval, ...]]:
    """Input name -> (lowest, highest) of each dimension, as `text` says.

    `text` is `"images[1,3,416,416],mask[1,?]"`, or `"[1,3,224,224]"` for a model with one input; a dimension
    is a size, `?` or `-1` for any, or bounds `1..8`. Raises `ShapeError` for what cannot be read, an unknown
    input, or a number of dimensions that is not the input's.
    """
    ranks = {spec.name: len(spec.shape) if "..." not in spec.shape else None for spec in inputs}
    shapes: dict[str, tuple[Interval, ...]] = {}
    for name, dims in _items(text, list(ranks)):
        name = name or _only_input(text, list(ranks))
        if name not in ranks:
            known = ", ".join(f'"{each}"' for each in ranks)
            raise ShapeError(
                f'shape "{text}": no input is called "{name}"{nearest(name, list(ranks))} (inputs: {known})'
            )
        if name in shapes:
            raise ShapeError(f'shape "{text}": input "{name}" is named twice')
        shape = tuple(_interval(word, text) for word in dims.split(",")) if dims.strip() else ()
        if ranks[name] not in (None, len(shape)):
            raise ShapeError(
                f'shape "{text}": input "{name}" has {ranks[name]} dimensions, {len(shape)} are given'
            )
        shapes[name] = shape
    return shapes


def apply_shapes(model: ov.Model, text: str, inputs: tuple[TensorSpec, ...]) -> None:
    """Reshape `model` in place to the shapes in `text`; `inputs` names its inputs in order.

    A dimension that the model fixes stays as it is. Raises `ShapeError` where `text` contradicts one, or
    where the graph does not work with the new shapes.
    """
    wanted = parse_shapes(text, inputs)
    new: dict[ov.Output, ov.PartialShape] = {}
    for port, spec in zip(model.inputs, inputs, strict=True):
        if spec.name not in wanted:
            continue
        old = port.get_partial_shape()
        dims = wanted[spec.name]
        if not old.rank.is_dynamic:
            dims = tuple(_meet(spec.name, index, old[index], dims[index]) for index in range(len(dims)))
        new[port] = ov.PartialShape([_dimension(low, high) for low, high in dims])
    try:
        model.reshape(new)
    except RuntimeError as exc:
        lines = [line for line in str(exc).splitlines() if line.strip()]
        raise ShapeError(f'shape "{text}": the model does not work with it: {lines[-1].strip()}') from exc


def spec_shape(shape: ov.PartialShape) -> tuple[int | str, ...]:
    """A partial shape as `TensorSpec` writes it."""
    if shape.rank.is_dynamic:
        return ("...",)
    return tuple(_dim_word(dim) for dim in shape)


def require_static(inputs: tuple[TensorSpec, ...], *, device: Device, shown: str = "") -> None:
    """Raise `ShapeError` where an input has a dimension without a size; names each, and the flag that helps.

    `inputs` are the ONNX file's own; `shown` names the model in the message.
    """
    dynamic = [spec for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)]
    if not dynamic:
        return
    listed = "; ".join(_describe_dynamic(spec) for spec in dynamic)
    example = ",".join(f"{spec.name}[{','.join(_example_dims(spec))}]" for spec in dynamic)
    where = f"{shown}: " if shown else ""
    raise ShapeError(
        f'{where}{device} needs fixed shapes, but {listed}; fix them, for example: --shape "{example}"'
    )


def _describe_dynamic(spec: TensorSpec) -> str:
    if "..." in spec.shape:
        return f'input "{spec.name}" has no known number of dimensions'
    places = [f"{index} ({dim})" for index, dim in enumerate(spec.shape) if isinstance(dim, str)]
    noun = "dimension" if len(places) == 1 else "dimensions"
    return f'input "{spec.name}" is open in {noun} {", ".join(places)}'


def _example_dims(spec: TensorSpec) -> list[str]:
    """Batch 1; 224 for the sides of an image; 128 for a sequence."""
    rank = len(spec.shape)
    guess = {3: ["1", "128", "128"], 4: ["1", "3", "224", "224"], 2: ["1", "128"]}.get(rank, ["1"] * rank)
    return [_example(dim, guess[index]) for index, dim in enumerate(spec.shape)]


def _example(dim: int | str, guess: str) -> str:
    if isinstance(dim, int):
        return str(dim)
    match = _INTERVAL.fullmatch(dim)
    if match is None:
        return guess
    low, high = int(match["low"] or 1), int(match["high"] or _ENDLESS)
    return str(min(max(int(guess), low), high))


def _items(text: str, known: list[str]) -> list[tuple[str, str]]:
    """(name, dimensions) pairs; a known name may hold any character, brackets too."""
    items = []
    rest = text.strip()
    while rest:
        start = rest.lstrip(",; ")
        name = next(
            (n for n in sorted(known, key=len, reverse=True) if n and start.startswith(f"{n}[")), None
        )
        match = _ITEM.match(start[len(name) :] if name else start)
        if match is None:
            raise ShapeError(f'shape "{text}": cannot read "{start}"; write it as "input[1,3,224,224]"')
        items.append((name or match["name"].strip(), match["dims"]))
        rest = (start[len(name) :] if name else start)[match.end() :].strip()
    if not items:
        raise ShapeError('the shape is empty; write it as "input[1,3,224,224]"')
    return items


def _only_input(text: str, names: list[str]) -> str:
    if len(names) != 1:
        known = ", ".join(f'"{each}"' for each in names)
        raise ShapeError(f'shape "{text}": say which input it is for, as "name[...]" (inputs: {known})')
    return names[0]


def _interval(word: str, text: str) -> Interval:
    word = word.strip()
    if word in ("?", "-1"):
        return 0, _ENDLESS
    if word.isdecimal():
        return int(word), int(word)
    match = _INTERVAL.fullmatch(word)
    if match is None or not (match["low"] or match["high"]):
        raise ShapeError(
            f'shape "{text}": "{word}" is no dimension; it is a size, "?", or bounds such as "1..8"'
        )
    low, high = int(match["low"] or 0), int(match["high"] or _ENDLESS)
    if low > high:
        raise ShapeError(f'shape "{text}": bounds "{word}" are the wrong way round')
    return low, high


def _meet(name: str, index: int, old: ov.Dimension, wanted: Interval) -> Interval:
    high = old.max_length if old.max_length >= 0 else _ENDLESS
    low = max(old.min_length, wanted[0])
    high = min(high, wanted[1])
    if low > high:
        raise ShapeError(
            f'input "{name}": dimension {index} is {_dim_word(old)} in the model and cannot become '
            f"{_dim_word(_dimension(*wanted))}"
        )
    return low, high


def _dimension(low: int, high: int) -> ov.Dimension:
    if low == high:
        return ov.Dimension(low)
    return ov.Dimension(low, -1 if high >= _ENDLESS else high)


def _dim_word(dim: ov.Dimension) -> int | str:
    if dim.is_static:
        return int(dim.get_length())
    low, high = dim.min_length, dim.max_length
    if high < 0 or high >= _ENDLESS:
        return "?" if low <= 0 else f"{low}.."
    return f"{low}..{high}"
