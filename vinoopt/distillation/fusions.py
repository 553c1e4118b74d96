"""Steps of a mirror that are run as one, because training a small network waits for memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vinoopt.distillation.rules import Function
from vinoopt.distillation.weights import Key

_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step:
    """One operator to run."""

    name: str
    title: str
    kind: str
    function: Function
    inputs: tuple[Key, ...]
    carries_batch: bool = False
    """Whether its constant shape begins with the model's own batch size."""
    absorbs_relu: bool = False
    """Whether it cuts off negative values by itself."""


def fused(steps: Sequence[Step], kept: Collection[Key]) -> tuple[Step, ...]:
    """The steps with biases added by their convolution, and without rectifiers in front of unsigned quantizers.

    A value that is `kept`, or that another step reads, is still computed.
    """
    readers: dict[Key, list[int]] = {}
    makers: dict[Key, int] = {}
    for number, step in enumerate(steps):
        makers[step.name, 0] = number
        for key in step.inputs:
            readers.setdefault(key, []).append(number)
    result: list[Step | None] = list(steps)
    for number, step in enumerate(steps):
        if step.kind == "Add" and len(step.inputs) == 2:
            for own, bias in (step.inputs, step.inputs[::-1]):
                maker = makers.get(own)
                is_inner = maker is not None and len(readers[own]) == 1 and own not in kept
                if is_inner and maker is not None and steps[maker].kind in _CONVOLUTIONS and bias not in makers:
                    result[maker] = None
                    result[number] = _with_bias(steps[maker], step, bias)
                    break
        if step.absorbs_relu:
            maker = makers.get(step.inputs[0])
            if maker is None or steps[maker].kind != "Relu" or step.inputs[0] in kept:
                continue
            result[number] = replace(step, inputs=steps[maker].inputs)
            if all(steps[reader].absorbs_relu for reader in readers[step.inputs[0]]):
                result[maker] = None
    return tuple(step for step in result if step is not None)


def _with_bias(convolution: Step, add: Step, bias: Key) -> Step:
    def convolve(x: Any, weight: Any, values: Any) -> Any:
        channels = weight.shape[0] * (weight.shape[1] if convolution.kind == "GroupConvolution" else 1)
        is_per_channel = values.ndim == x.ndim and values.numel() == channels == values.shape[1]
        if is_per_channel:
            return convolution.function(x, weight, values.reshape(-1))
        return convolution.function(x, weight) + values

    whole = replace(convolution, function=convolve, inputs=(*convolution.inputs, bias), kind="Convolution")
    return replace(whole, name=add.name)
