"""From a plan to a model: pruned, refitted, quantized, with what plans share done once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import openvino as ov

from vinoopt import serde
from vinoopt.accuracy.datasets import Dataset
from vinoopt.compression.precision import QuantizedPair, find_blocks, with_float_blocks
from vinoopt.compression.quantize import compress_weights, quantize
from vinoopt.records import CompressionPlan, Device, DistillationPlan, GroupWidth, QuantizationPlan
from vinoopt.store import Store

_KEPT_MODELS = 4
"""Pruned or quantized models held in memory at a time; others come back from the store or are made again."""

T = TypeVar("T")
Pruner = Callable[[tuple[GroupWidth, ...]], ov.Model]
"""Widths -> the float model with those units removed and its consumers refitted."""

Corrector = Callable[[tuple[GroupWidth, ...], ov.Model], ov.Model]
"""Widths and their quantized model -> the same with its biases corrected."""

Trainer = Callable[[CompressionPlan, ov.Model], ov.Model]
"""A plan and its model before the last run of its distillation -> the model after it."""


@dataclass(kw_only=True)
class Workshop:
    """Builds the model of any plan of one float model for one kind of device.

    A quantized model is calibrated once per recipe and widths, kept in memory and in `store`, and serves every
    precision plan. Not safe for use by several threads.
    """

    source: ov.Model
    calibration: Dataset
    device: Device
    store: Store
    ignored: tuple[str, ...] = ()
    """Layers that the user wants left alone: float in every plan."""
    prune: Pruner | None = None
    correct: Corrector | None = None
    distill: Trainer | None = None
    _pruned: OrderedDict[str, ov.Model] = field(default_factory=OrderedDict)
    _pairs: OrderedDict[str, QuantizedPair] = field(default_factory=OrderedDict)

    @property
    def is_calibrated(self) -> bool:
        """Whether an earlier run left quantized models."""
        return any(self.store.folder.glob(f"int8-{self.device.value.lower()}-*.xml"))

    def is_pruned(self, widths: tuple[GroupWidth, ...]) -> bool:
        """Whether the float model at these widths can be had: it is in the store, or there is a pruner."""
        return self.prune is not None or (self.store.folder / f"{_pruned_name(widths)}.xml").is_file()

    def build(self, plan: CompressionPlan) -> ov.Model:
        """The model of `plan`, independent of every other one.

        Raises `PlanError` where the plan does not fit the model, `CompressionError` where NNCF fails.
        """
        if plan.distillation is not None:
            return self._distilled(plan, plan.distillation)
        if plan.quantization is not None:
            pair = self.pair(plan.widths, plan.quantization)
            present = {block.name for block in find_blocks(pair)}  # pruning may have removed a whole branch
            model = with_float_blocks(pair, present & set(plan.quantization.float_layers))
        else:
            model = self.pruned(plan.widths).clone()
        return model if plan.weights is None else compress_weights(model, plan.weights)

    def _distilled(self, plan: CompressionPlan, distillation: DistillationPlan) -> ov.Model:
        """The model before the last run of the plan's distillation, trained by that run."""
        earlier = serde.replace(distillation, runs=distillation.runs[:-1]) if distillation.runs[:-1] else None
        before = serde.replace(plan, distillation=earlier)

        def make() -> ov.Model:
            if self.distill is None:
                raise ValueError("this workshop was made without a trainer")
            return self.distill(plan, self.build(before))

        name = f"distilled-{self.device.value.lower()}-{serde.sha256_record(plan)[:24]}"
        return self._stored(name, make)

    def pruned(self, widths: tuple[GroupWidth, ...]) -> ov.Model:
        """The float model at these widths; not to be changed by the caller."""
        if not widths:
            return self.source

        def make() -> ov.Model:
            if self.prune is None:
                raise ValueError("this workshop was made without a pruner")
            return self.prune(widths)

        name = _pruned_name(widths)
        return _kept(self._pruned, name, lambda: self._stored(name, make))

    def pair(self, widths: tuple[GroupWidth, ...], recipe: QuantizationPlan) -> QuantizedPair:
        """The pruned float model and its quantized twin; of `recipe.float_layers` only the ignored scope applies."""
        recipe = serde.replace(recipe, float_layers=self.ignored)
        key = serde.sha256_record(CompressionPlan(widths=widths, quantization=recipe)) + self.device.value

        def make() -> QuantizedPair:
            original = self.pruned(widths)
            name = f"int8-{self.device.value.lower()}-{key[:24]}"
            quantized = self._stored(name, lambda: self._quantized(original, widths, recipe))
            return QuantizedPair(original=original, quantized=quantized)

        return _kept(self._pairs, key, make)

    def _quantized(
        self, original: ov.Model, widths: tuple[GroupWidth, ...], recipe: QuantizationPlan
    ) -> ov.Model:
        model = quantize(original, recipe, self.calibration, device=self.device)
        return self.correct(widths, model) if widths and self.correct is not None else model

    def _stored(self, name: str, make: Callable[[], ov.Model]) -> ov.Model:
        path = self.store.folder / f"{name}.xml"
        if path.is_file():
            return ov.Core().read_model(path)
        model = make()
        with self.store.writing(f"{name}.xml") as part:
            ov.save_model(model, part, compress_to_fp16=False)
            part.with_suffix(".bin").replace(path.with_suffix(".bin"))  # the .xml, which counts, comes last
        return model


def _pruned_name(widths: tuple[GroupWidth, ...]) -> str:
    return f"pruned-{serde.sha256_record(CompressionPlan(widths=widths))[:24]}"


def _kept(kept: OrderedDict[str, T], key: str, make: Callable[[], T]) -> T:
    """The value under `key`, made where it is new; the one used longest ago gives way."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > _KEPT_MODELS:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
