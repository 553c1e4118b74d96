"""Options that several commands share, and how their words become records."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vinoopt.errors import PreprocessError
from vinoopt.records import PreprocessSpec

F = TypeVar("F", bound=Callable[..., Any])

_IMAGE_KEYS = ("image_layout", "model_layout", "colour_order", "mean", "scale", "image_size", "resize", "fit")


def preprocess_options(function: F) -> F:
    """The flags and the file that describe preprocessing to embed."""
    for option in reversed(
        [
            click.option(
                "--preprocess",
                "preprocess_file",
                type=click.Path(path_type=Path),
                help="TOML file that describes preprocessing to embed; instead of the flags below.",
            ),
            click.option("--image-layout", help="Layout of what is fed.  [default: NHWC]"),
            click.option("--model-layout", help="Layout of the model's input.  [default: NCHW]"),
            click.option(
                "--color-order",
                "--colour-order",
                "colour_order",
                type=click.Choice(["RGB", "BGR"]),
                help="Channel order that the model was trained with; images are fed as RGB.",
            ),
            click.option("--mean", "--mean-values", "mean", help="One or a value per channel: 123.7,116.3,103.5"),
            click.option("--scale", "--scale-values", "scale", help="One or a value per channel; divides."),
            click.option("--image-size", help="HxW of the images fed, if not the model's: the graph resizes."),
            click.option("--resize", type=click.Choice(["linear", "cubic", "nearest"]), help="How it resizes."),
            click.option(
                "--fit",
                type=click.Choice(["crop", "squash", "letterbox"]),
                help="How image files are brought to the size that is fed.  [default: crop]",
            ),
        ]
    ):
        function = option(function)
    return function


def preprocess_from(options: dict[str, Any]) -> tuple[PreprocessSpec, ...]:
    """Take the preprocessing flags out of `options`; empty where none was given."""
    file = options.pop("preprocess_file", None)
    given = {key: value for key in _IMAGE_KEYS if (value := options.pop(key, None)) is not None}
    if file is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise PreprocessError(f"--preprocess {file} and --{flag} exclude each other")
        from vinoopt.frontend.preprocess import read_preprocess

        return read_preprocess(file)
    if not given:
        return ()
    for key in ("mean", "scale"):
        if key in given:
            given[key] = _numbers(given[key], f"--{key}")
    if "image_size" in given:
        given["image_size"] = _size(given["image_size"])
    return (PreprocessSpec(**given),)


def metric_options_from(pairs: tuple[str, ...], label_offset: int | None) -> dict[str, str | int | float]:
    """`KEY=VALUE` words as a metric's options."""
    options: dict[str, str | int | float] = {} if label_offset is None else {"label_offset": label_offset}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f'--metric-option "{pair}" is not KEY=VALUE')
        options[key] = _number(value)
    return options


def seconds_from(text: str | None) -> float | None:
    """`90`, `90s`, `15m`, `2h` as seconds."""
    if text is None:
        return None
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:].lower())
    number = text[:-1] if unit is not None else text
    try:
        seconds = float(number) * (unit or 1.0)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < math.inf:  # false for NaN, which no clock ever passes
        raise click.UsageError(f'--time-limit "{text}" is not a time; write 90, 90s, 15m or 2h')
    return seconds


def milliseconds_from(text: str, flag: str) -> float:
    """`20`, `20ms`, `0.02s`, `20000us` as milliseconds."""
    word = text.strip().lower()
    unit = next((each for each in ("ms", "us", "s") if word.endswith(each)), "")
    try:
        found = float(word.removesuffix(unit)) * {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3}[unit]
    except ValueError:
        found = -1.0
    if not 0 < found < math.inf:
        raise click.UsageError(f'{flag} "{text}" is not a time; write 20ms, or 20 for milliseconds')
    return found


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.strip("[]() ").split(","))
    except ValueError as exc:
        raise PreprocessError(f'{flag} "{text}" is not a list of numbers like 123.7,116.3,103.5') from exc


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not x or not height.isdigit() or not width.isdigit():
        raise PreprocessError(f'--image-size "{text}" is not HEIGHTxWIDTH like 480x640')
    return int(height), int(width)


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
