"""Who runs in a benchmark: from the words of a request to contestants and the samples they run on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino as ov
from pydantic import Field

from vinoopt.accuracy.datasets import Dataset, load_dataset
from vinoopt.bench import Contestant, Engine, Sample
from vinoopt.bundle import GOLDEN, MANIFEST, Bundle, golden_inputs, open_bundle
from vinoopt.compression.quantize import quantize
from vinoopt.errors import BundleError, DeviceError, InputError, ModelError, ShapeError
from vinoopt.frontend import shapes
from vinoopt.frontend.load import load_onnx
from vinoopt.frontend.normalize import SourceModel, load_model
from vinoopt.frontend.parity import random_samples
from vinoopt.frontend.preprocess import compute, resolve
from vinoopt.records import (
    CompileRequest,
    Device,
    DeviceSpec,
    PreprocessSpec,
    QuantizationPlan,
    Record,
    RuntimeProperties,
    TargetResult,
    TensorSpec,
)
from vinoopt.toolchains.host import reason_of
from vinoopt.tuning import TuneTask

SAMPLES = 64
"""Fresh inputs that requests cycle through."""
SUBSET_SIZE = 300
_PRECISION, _HINT = "INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"
_FOR_ALL = (_HINT, "NUM_STREAMS", "INFERENCE_NUM_THREADS", "PERFORMANCE_HINT_NUM_REQUESTS")
"""Properties of a request that all contestants get; the others are for the main model, and bare files beside it."""


class LineupRequest(Record):
    """What shall be measured against what."""

    model: str
    """A bundle, or an ONNX, IR or blob file."""
    against: tuple[str, ...] = ()
    """`fp32`, `bf16`, `int8` (plain `nncf.quantize`), `onnxruntime`, or a path like `model`."""
    device: str = "CPU"
    properties: RuntimeProperties = RuntimeProperties()
    is_hinted: bool = True
    """False: no contestant gets a `PERFORMANCE_HINT`, not even that of a bundle."""
    requests: int | None = Field(default=None, ge=1)
    """In flight where throughput is measured; None: as many as the device likes."""
    data: str | None = None
    preprocess: tuple[PreprocessSpec, ...] = ()
    shape: str | None = None
    batch: int | None = Field(default=None, ge=1)
    allow_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineup:
    """Contestants, the main model first, and their common samples."""

    contestants: tuple[Contestant, ...]
    samples: tuple[Sample, ...]
    messages: tuple[str, ...]
    origin: str
    """Where the samples came from: `random`, `golden`, or what was given as data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Main:
    """The model in question, and the ONNX file behind it where that is known."""

    contestant: Contestant
    inputs: tuple[TensorSpec, ...]
    onnx: Path | None = None
    shape: str | None = None
    preprocess: tuple[PreprocessSpec, ...] = ()
    data: str | None = None
    golden: Path | None = None

    def source(self) -> SourceModel:
        """The float model; `InputError` where its ONNX file is not known or gone."""
        if self.onnx is None or not self.onnx.is_file():
            place = (
                f"{self.onnx} is gone" if self.onnx else f"{self.contestant.name} does not tell its ONNX file"
            )
            raise InputError(f"{place}; name the float model with --against PATH")
        return load_model(self.onnx, shape=self.shape, preprocess=self.preprocess)


def line_up(request: LineupRequest) -> Lineup:
    """Everything `bench.measure` needs for the request, the quantized reference included.

    Raises `InputError` and its kin for what cannot be found or does not fit together.
    """
    main = _main(request)
    samples = _samples(request, main)
    contestants = [main.contestant]
    for word in dict.fromkeys(request.against):
        build = _REFERENCES.get(word, _path_reference)
        found = build(request, main, word, samples)
        contestants.append(replace(found, name=_own_name(found.name, word, [each.name for each in contestants])))
    contestants = [
        replace(each, is_hinted=request.is_hinted, requests=request.requests, batch=request.batch or 1)
        for each in contestants
    ]
    messages = samples.messages
    if main.preprocess and any(each.engine is Engine.ONNXRUNTIME for each in contestants):
        messages += ("preprocessing is inside the clock of the models that embed it, and outside for onnxruntime",)
    return Lineup(
        contestants=tuple(contestants), samples=samples.measured, messages=messages, origin=samples.origin
    )


def _own_name(name: str, word: str, taken: Sequence[str]) -> str:
    """The name, else the word it was asked for by, else that with a number: whichever nobody has."""
    numbered = (f"{word} ({number})" for number in itertools.count(2))
    return next(each for each in itertools.chain((name, word), numbered) if each not in taken)


# --------------------------------------------------------------------------- the main model


def _main(request: LineupRequest) -> _Main:
    path = Path(request.model)
    if path.is_dir():
        return _from_bundle(request, path)
    openers = {".onnx": _from_onnx, ".xml": _from_ir, ".blob": _from_blob}
    if path.suffix not in openers:
        raise InputError(f"{path} is neither a bundle nor one of {', '.join(openers)}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    return openers[path.suffix](request, path)


def target_of(bundle: Bundle, device: str) -> TargetResult:
    """The bundle's target that a device of this machine (`GPU.1`) or a target's own name stands for."""
    kind = device.partition(".")[0]
    return bundle.result(kind if kind in list(Device) else device)


def _from_bundle(request: LineupRequest, path: Path) -> _Main:
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
    if request.shape or request.batch or request.preprocess:
        raise InputError(f"{path} is a bundle: its shapes and preprocessing were fixed when it was compiled")
    bundle = open_bundle(path)
    result = target_of(bundle, request.device)
    folder = path / result.target.slug
    own = json.loads((folder / "runtime.json").read_text(encoding="utf-8"))
    asked: CompileRequest = bundle.manifest.request
    if not request.is_hinted:
        own.pop(_HINT, None)
    contestant = Contestant(
        name=path.name,
        model=folder / "model.xml",
        device=_device_name(request.device, result.target.device),
        properties={**own, **request.properties.as_dict()},
    )
    return _Main(
        contestant=contestant,
        inputs=bundle.manifest.inputs,
        onnx=Path(asked.model),
        shape=asked.shape,
        preprocess=asked.preprocess,
        data=asked.calibration_data or asked.data,
        golden=path / GOLDEN,
    )


def _from_onnx(request: LineupRequest, path: Path) -> _Main:
    shape = _shape_text(load_onnx(path).inputs, request)
    source = load_model(path, shape=shape, preprocess=request.preprocess)
    return _Main(
        contestant=_contestant(request, path.stem, source.model),
        inputs=source.inputs,
        onnx=path,
        shape=shape,
        preprocess=request.preprocess,
    )


def _from_ir(request: LineupRequest, path: Path) -> _Main:
    _refuse_preprocess(request, path)
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as exc:
        raise ModelError(f"{path} cannot be read: {reason_of(exc)}") from exc
    inputs = _port_specs(model.inputs)
    shape = _shape_text(inputs, request)
    if shape is not None:
        shapes.apply_shapes(model, shape, inputs)
    return _Main(contestant=_contestant(request, path.stem, model), inputs=_port_specs(model.inputs))


def _from_blob(request: LineupRequest, path: Path) -> _Main:
    _refuse_preprocess(request, path)
    if request.shape or request.batch:
        raise InputError(f"{path} is a blob: its shapes were fixed when it was compiled")
    try:
        compiled = ov.Core().import_model(path.read_bytes(), request.device)
    except RuntimeError as exc:
        raise DeviceError(f"{path} cannot be imported on {request.device}: {reason_of(exc)}") from exc
    return _Main(contestant=_contestant(request, path.stem, path), inputs=_port_specs(compiled.inputs))


def _contestant(request: LineupRequest, name: str, model: ov.Model | Path) -> Contestant:
    return Contestant(name=name, model=model, device=request.device, properties=request.properties.as_dict())


def _refuse_preprocess(request: LineupRequest, path: Path) -> None:
    if request.preprocess:
        raise InputError(f"{path}: preprocessing can be embedded into ONNX files only")


def _device_name(asked: str, device: Device) -> str:
    """OpenVINO's name for the device: `GPU.1` as asked, else the kind the target is of."""
    return asked if asked.partition(".")[0] == device.value else device.value


def _shape_text(inputs: Sequence[TensorSpec], request: LineupRequest) -> str | None:
    """`--shape`, or open batches (first dimensions) closed with `--batch`, 1 by default."""
    if request.shape is not None:
        return request.shape
    parts = []
    for spec in inputs:
        is_open = bool(spec.shape) and not isinstance(spec.shape[0], int)
        if spec.shape and "..." not in spec.shape and (is_open or request.batch is not None):
            parts.append(_shape_words([(spec.name, (request.batch or 1, *spec.shape[1:]))]))
    return ",".join(parts) or None


def _port_specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=min(port.names) if port.names else port.node.get_friendly_name(),
            shape=shapes.spec_shape(port.partial_shape),
            dtype=str(np.dtype(port.element_type.to_dtype())),
        )
        for port in ports
    )


# --------------------------------------------------------------------------- samples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    measured: tuple[Sample, ...]
    calibration: Dataset | None
    """None where the inputs are too few, or not real."""
    messages: tuple[str, ...]
    origin: str


def _samples(request: LineupRequest, main: _Main) -> _Samples:
    source = request.data or (main.data if main.data and Path(main.data).exists() else None)
    if source is not None:
        dataset = load_dataset(
            source, inputs=main.inputs, preprocess=main.preprocess, allow_code=request.allow_code
        )
        measured = tuple(dataset[i] for i in range(min(len(dataset), SAMPLES)))
        return _Samples(measured=measured, calibration=dataset, messages=dataset.messages, origin=source)
    if main.golden is not None and main.golden.is_file():
        golden = tuple(golden_inputs(main.golden.parent))
        message = "inputs are the bundle's golden ones"
        return _Samples(measured=golden, calibration=None, messages=(message,), origin="golden")
    _require_sizes(main)
    made = random_samples(cast(SourceModel, _Inputs(main.inputs)), SAMPLES)
    message = "inputs are random numbers; give --data for real ones"
    return _Samples(measured=tuple(made), calibration=None, messages=(message,), origin="random")


def _require_sizes(main: _Main) -> None:
    """Refuse to make inputs of a size that nobody named: times would be those of a toy."""
    open_ones = [spec for spec in main.inputs if any(isinstance(size, str) for size in spec.shape)]
    if open_ones:
        listed = _shape_words((spec.name, spec.shape) for spec in open_ones)
        raise ShapeError(
            f"{main.contestant.name} leaves sizes of its inputs open ({listed}): name them with --shape, or give "
            "real inputs with --data"
        )


def _shape_words(shapes: Iterable[tuple[str, Sequence[int | str]]]) -> str:
    return ",".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in shapes)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """All that `random_samples` reads of a model."""

    inputs: tuple[TensorSpec, ...]


# --------------------------------------------------------------------------- references


def _common(request: LineupRequest) -> dict[str, str]:
    return {key: value for key, value in request.properties.items if key in _FOR_ALL}


def _float_reference(request: LineupRequest, main: _Main, word: str, samples: _Samples) -> Contestant:
    precision = {"fp32": "f32", "bf16": "bf16"}[word]
    properties = {**_common(request), _PRECISION: precision}
    return Contestant(
        name=word, model=main.source().model, device=main.contestant.device, properties=properties
    )


def _int8_reference(request: LineupRequest, main: _Main, word: str, samples: _Samples) -> Contestant:
    if samples.calibration is None:
        raise InputError("--against int8 quantizes the float model here and needs --data to calibrate it")
    device = main.contestant.device
    plan = QuantizationPlan(subset_size=SUBSET_SIZE)
    kind = device.partition(".")[0]
    if kind not in list(Device):
        raise InputError(
            f'--against int8 quantizes for one kind of device, and "{device}" stands for several: name it with -d, '
            "or a quantized file with --against"
        )
    model = quantize(main.source().model, plan, samples.calibration, device=Device(kind))
    return Contestant(name=word, model=model, device=device, properties=_common(request))


def _onnxruntime_reference(request: LineupRequest, main: _Main, word: str, samples: _Samples) -> Contestant:
    source = main.source()
    threads = {k: v for k, v in _common(request).items() if k == "INFERENCE_NUM_THREADS"}
    specs = resolve(main.preprocess, source.model_inputs)
    tensors = {spec.name: spec for spec in source.model_inputs}
    own = [
        {
            name: compute(specs[name], value, tensors[name]) if name in specs else value
            for name, value in sample.items()
        }
        for sample in samples.measured
    ]
    return Contestant(
        name=word, model=source.path, properties=threads, engine=Engine.ONNXRUNTIME, samples=own
    )


def _path_reference(request: LineupRequest, main: _Main, word: str, samples: _Samples) -> Contestant:
    if not Path(word).exists():
        known = ", ".join(_REFERENCES)
        raise InputError(f'--against "{word}": neither a file or bundle, nor one of {known}')
    path = Path(word)
    # A bundle keeps the precision that it was judged with; of two bare files both have the one that is asked for.
    is_bare = path.suffix in (".onnx", ".xml")
    other = LineupRequest(
        model=word,
        device=request.device if path.is_dir() else main.contestant.device,
        properties=request.properties if is_bare else RuntimeProperties.of(_common(request)),
        is_hinted=request.is_hinted,
        preprocess=main.preprocess if path.suffix == ".onnx" else (),
        shape=_shape_for(path, main, samples),
    )
    return _main(other).contestant


def _shape_for(path: Path, main: _Main, samples: _Samples) -> str | None:
    """The main model's shape for a file that can be reshaped: an ONNX file's own, else that of what is fed."""
    if path.suffix not in (".onnx", ".xml"):
        return None
    if path.suffix == ".onnx" and main.onnx is not None:
        return main.shape
    fed = [(name, np.shape(array)) for name, array in samples.measured[0].items()]
    return _shape_words(fed) if len(fed) > 1 else _shape_words(("", shape) for _, shape in fed)


_REFERENCES: dict[str, Callable[[LineupRequest, _Main, str, _Samples], Contestant]] = {
    "fp32": _float_reference,
    "bf16": _float_reference,
    "int8": _int8_reference,
    "onnxruntime": _onnxruntime_reference,
}


# --------------------------------------------------------------------------- tuning


def tuning_task(
    request: LineupRequest, *, spec: DeviceSpec | None = None
) -> tuple[TuneTask, RuntimeProperties, tuple[str, ...]]:
    """What `tuning.tune` needs for the request: the task, the properties that must stay, and messages.

    A bundle keeps the inference precision that it was judged with, and is held against its float model where
    that is still there. Raises `InputError` for a blob, whose properties are fixed.
    """
    main = _main(request)
    model = main.contestant.model
    if isinstance(model, Path):
        if model.suffix == ".blob":
            raise InputError(f"{model} is a blob: its properties were fixed when it was compiled")
        model = ov.Core().read_model(model)
    if not isinstance(model, ov.Model):
        raise InputError(f"{request.model} holds no model that can be compiled anew")
    samples = _samples(request, main)
    fixed = {k: v for k, v in main.contestant.properties.items() if k == _PRECISION}
    is_known = main.onnx is not None and main.onnx.is_file()
    task = TuneTask(
        model=model,
        samples=samples.measured,
        device=main.contestant.device,
        spec=spec,
        reference=main.source().model if is_known else None,
    )
    return task, RuntimeProperties.of(fixed), samples.messages
