"""A compressed `ov.Model` as a PyTorch module: the same operators, its weights, biases and ranges as parameters.

What is trained: the constants that contractions, embeddings and recurrent cells read; per-channel constants of
elementwise operators behind the first of those; the ranges of FakeQuantize; weights that NNCF stores as integers
(integer constant, Convert, Subtract, Multiply), as real values that are rounded anew in every step, with their
scales. Everything else is computed as it stands; what depends on constants only is computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from vinoopt.distillation import elementwise, layers, recurrent, resampling, shaping
from vinoopt.distillation.fusions import Step, fused
from vinoopt.distillation.quantizers import Grid, clamp, fake_quantize
from vinoopt.distillation.rules import FOREIGN_ERRORS, failing, first_line, function_of, refuse, whole
from vinoopt.distillation.weights import Key, Weight, as_tensor, find_weights, key_of
from vinoopt.errors import DistillationError

RULE_ROOMS = (elementwise, layers, recurrent, resampling, shaping)
"""Imported for the rules that they enter."""
_BATCHED = frozenset({"Reshape", "Broadcast"})
_ENDINGS = frozenset({"Softmax", "Sigmoid"})
"""Operators that make class scores of an output's last values."""


class _Range:
    """The factors of the ranges of all quantizers that were given the same range."""

    def __init__(self, shape: Sequence[int], grid: Grid, *, is_live: bool) -> None:
        self.grid = grid
        self.is_live = is_live
        """Whether they quantize values that hang on the inputs, not weights."""
        self.theta = torch.nn.Parameter(torch.zeros(tuple(shape)))
        self.phi = torch.nn.Parameter(torch.zeros(tuple(shape))) if grid.is_skewed else None
        """Of the upper end of a skewed range alone."""
        self.nodes: list[tuple[ov.Node, list[Any]]] = []

    def parameters(self) -> list[Any]:
        """The trained logarithms of factors, each in the shape of the range."""
        return [self.theta] if self.phi is None else [self.theta, self.phi]

    def write(self) -> None:
        """Put the present ranges into the model."""
        factor = torch.exp(self.theta.detach().cpu())
        for node, bounds in self.nodes:
            scaled = [bound * factor for bound in bounds]
            if self.phi is not None:
                ends = self.grid.bounds(*self.grid.skewed(self.theta.item(), self.phi.item()))
                scaled = [torch.full_like(bound, ends[place % 2]) for place, bound in enumerate(bounds)]
            for port, bound in enumerate(scaled, start=1):
                old = node.input_value(port).get_node()
                new = ops.constant(bound.numpy(), old.get_element_type())
                new.set_friendly_name(old.get_friendly_name())
                node.input(port).replace_source_output(new.output(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """The operator that makes scores of an output's last values."""

    kind: str
    """`Softmax` or `Sigmoid`."""
    key: Key
    """The values before it."""
    axis: int = 1
    """Of a softmax: along which its classes lie."""


class Mirror(torch.nn.Module):  # type: ignore[misc]
    """`model` in PyTorch; `write` puts what was trained into `model`.

    Raises `DistillationError` with the name of an operator that has no rule.
    """

    def __init__(self, model: ov.Model, *, trains: bool = True) -> None:
        super().__init__()
        self.model = model
        self.input_keys: tuple[Key, ...] = tuple((p.get_name(), 0) for p in model.get_parameters())
        self.own_batch = _own_batch(model)
        self.results: tuple[Key, ...] = tuple(key_of(result.input_value(0)) for result in model.get_results())
        self.endings: tuple[Ending | None, ...] = tuple(_ending(result) for result in model.get_results())
        """Per output what makes scores of it; None where nothing does."""
        self._weights: tuple[Weight, ...] = tuple(find_weights(model)) if trains else ()
        self._ranges: dict[bytes, _Range] = {}
        self._constants: dict[Key, Any] = {}
        self._live: set[str] = {p.get_name() for p in model.get_parameters()}
        self._trains = trains
        self._device = "cpu"
        self._samples = 0
        """Of the pass at hand; what has so many along its first axis has one sample at each place of it."""
        self.rounds = True
        """Whether quantizers of activations round; they always clamp."""
        self._steps = fused(self._read(model), self._kept_keys())
        values = [p for weight in self._weights for p in weight.parameters()[:1]]
        scales = [p for weight in self._weights for p in weight.parameters()[1:]]
        scales += [p for each in self._ranges.values() if not each.is_live for p in each.parameters()]
        ranges = [p for each in self._ranges.values() if each.is_live for p in each.parameters()]
        self.values, self.scales, self.ranges = map(torch.nn.ParameterList, (values, scales, ranges))
        self.requires_grad_(trains)
        self._last_reader = {key: number for number, step in enumerate(self._steps) for key in step.inputs}

    def forward(self, inputs: Sequence[Any], keys: Sequence[Key]) -> list[Any]:
        """The values at `keys`; `inputs` in the model's order, of its own batch size or a multiple of it."""
        values: dict[Key, Any] = dict(self._constants)
        values.update(zip(self.input_keys, (x.to(self._device) for x in inputs), strict=True))
        values.update({weight.key: weight.value() for weight in self._weights})
        wanted = set(keys)
        self._samples = inputs[0].shape[0] if inputs[0].ndim else 0
        factor = inputs[0].shape[0] // self.own_batch if self.own_batch and inputs[0].ndim else 1
        for number, step in enumerate(self._steps):
            try:
                arguments = [values[key] for key in step.inputs]
                if step.carries_batch and factor != 1:
                    arguments[1] = torch.tensor([(self.own_batch or 1) * factor, *whole(arguments[1])[1:]])
                result = step.function(*arguments)
            except FOREIGN_ERRORS as exc:
                raise _broken(step, exc) from exc
            if isinstance(result, tuple | list):
                values.update({(step.name, port): each for port, each in enumerate(result)})
            else:
                values[step.name, 0] = result
            for key in step.inputs:  # what nobody reads any more need not be held
                if self._last_reader[key] == number and key not in wanted and key not in self._constants:
                    values.pop(key, None)
        return [values[key] for key in keys]

    def write(self) -> None:
        """Put weights, scales and ranges as they are now into the model."""
        for weight in self._weights:
            weight.write()
        for each in self._ranges.values():
            each.write()

    def places(self, kinds: Collection[str]) -> dict[str, Key]:
        """Friendly name -> output of the operators of these kinds that join two computed values, in graph order."""
        return {
            step.title: (step.name, 0)
            for step in self._steps
            if step.kind in kinds and sum(source in self._live for source, _ in step.inputs) > 1
        }

    def place(self, device: str) -> None:
        """Move parameters, constants and masks to a device; whole numbers stay, since shapes are read from them."""
        self._device = device
        self.to(device)
        self._constants = {
            key: value.to(device) if value.is_floating_point() or value.dtype == torch.bool else value
            for key, value in self._constants.items()
        }

    # ------------------------------------------------------------------ reading the graph

    def _kept_keys(self) -> frozenset[Key]:
        return frozenset([*self.results, *(ending.key for ending in self.endings if ending is not None)])

    def _read(self, model: ov.Model) -> tuple[Step, ...]:
        trained = {weight.key for weight in self._weights}
        steps = []
        for node in model.get_ordered_ops():
            name, kind = node.get_name(), node.get_type_name()
            if kind in ("Parameter", "Result") or (name, 0) in trained:
                continue
            if kind == "Constant":
                with failing(f"reading constant '{node.get_friendly_name()}'"):
                    self._constants[name, 0] = as_tensor(node)
                continue
            inputs = tuple(key_of(value) for value in node.input_values())
            step = self._quantizer(node, inputs[0]) if kind == "FakeQuantize" else self._plain(node, inputs)
            if any(source in self._live for source, _ in inputs):
                self._live.add(name)
            if all(key in self._constants for key in step.inputs) and kind != "Range":
                self._fold(step)
            else:
                steps.append(step)
        return tuple(steps)

    def _plain(self, node: ov.Node, inputs: tuple[Key, ...]) -> Step:
        own = self.own_batch
        carries = (
            node.get_type_name() in _BATCHED
            and own is not None
            and inputs[0][0] in self._live
            and inputs[1] in self._constants
            and whole(self._constants[inputs[1]])[:1] == [own]
        )
        return Step(
            name=node.get_name(),
            title=node.get_friendly_name(),
            kind=node.get_type_name(),
            function=function_of(node),
            inputs=inputs,
            carries_batch=carries,
        )

    def _quantizer(self, node: ov.Node, source: Key) -> Step:
        keys = [key_of(value) for value in node.input_values()[1:]]
        if not all(key in self._constants for key in keys):
            raise refuse(node, "computed ranges")
        bounds = [self._constants[key] for key in keys]
        grid = Grid.of(*bounds, levels=int(node.get_attributes()["levels"]))
        shape = torch.broadcast_shapes(*(bound.shape for bound in bounds))
        raw = [np.ascontiguousarray(bound.numpy()).tobytes() for bound in bounds]
        is_live = source[0] in self._live
        content = b"".join([repr((tuple(shape), is_live)).encode(), *raw])
        # A quantizer of a constant that is not trained stays as it is.
        is_trained = self._trains and source not in self._constants
        shared = _Range(shape, grid, is_live=is_live)
        if is_trained:
            shared = self._ranges.setdefault(content, shared)
        shared.nodes.append((node, bounds))

        def quantize(x: Any) -> Any:
            if self.rounds or not is_live:
                has_samples = is_live and x.ndim > 0 and len(x) == self._samples
                return fake_quantize(x, shared.theta, grid, phi=shared.phi, has_samples=has_samples)
            return clamp(x, shared.theta, grid, phi=shared.phi)

        return Step(
            name=node.get_name(),
            title=node.get_friendly_name(),
            kind=node.get_type_name(),
            function=quantize,
            absorbs_relu=is_live and float(grid.low.min()) == 0,
            inputs=(source,),
            carries_batch=False,
        )

    def _fold(self, step: Step) -> None:
        try:
            with torch.no_grad():
                result = step.function(*(self._constants[key] for key in step.inputs))
        except FOREIGN_ERRORS as exc:
            raise _broken(step, exc) from exc
        results = result if isinstance(result, tuple | list) else (result,)
        self._constants.update({(step.name, port): each for port, each in enumerate(results)})


def _broken(step: Step, exc: BaseException) -> DistillationError:
    return DistillationError(f"operator {step.kind} ('{step.title}') failed in PyTorch: {first_line(exc)}")


def _own_batch(model: ov.Model) -> int | None:
    """The first size that all inputs have in common; None where it is dynamic."""
    sizes = set()
    for parameter in model.get_parameters():
        shape = parameter.get_partial_shape()
        if shape.rank.is_dynamic or not len(shape):
            continue
        sizes.add(int(shape[0].get_length()) if shape[0].is_static else None)
    return sizes.pop() if len(sizes) == 1 else None


def _ending(result: ov.Node) -> Ending | None:
    value = result.input_value(0)
    while value.get_node().get_type_name() == "Convert" and value.get_element_type().is_real():
        value = value.get_node().input_value(0)
    source = value.get_node()
    kind = source.get_type_name()
    if kind not in _ENDINGS:
        return None
    rank, axis = source.get_output_partial_shape(0).rank, int(source.get_attributes().get("axis", 1))
    axis = axis % rank.get_length() if rank.is_static else axis
    return Ending(kind=kind, key=key_of(source.input_value(0)), axis=axis)
