"""What takes part in a measurement: OpenVINO models, files and blobs, and onnxruntime sessions."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import openvino as ov
import psutil
from numpy.typing import NDArray

from vinoopt.errors import DataError, DeviceError, InputError, ModelError
from vinoopt.toolchains.host import reason_of

Sample: TypeAlias = Mapping[str, NDArray[Any]]
"""One request's inputs: input name -> array of the shape and type that the model takes."""

_NO_RUN = "{name}: {device} could not run it: {reason}"
_PRECISION = "INFERENCE_PRECISION_HINT"


class MeasureMode(str, Enum):
    """What is measured: one request at a time, or as many in flight as the device likes."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"

    def __str__(self) -> str:
        return self.value


class Engine(str, Enum):
    """What runs a model file."""

    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class Runner(Protocol):
    """A model that is ready to run. Whatever has these members can be measured."""

    device: str
    compile_ms: float | None
    size_bytes: int | None
    in_flight: int
    """Requests that `stream` keeps in flight."""
    warnings: tuple[str, ...]
    """In what it is not what was asked for."""

    def load(self, samples: Sequence[Sample]) -> None:
        """Keep the samples ready, so that a request costs no preparation; `DataError` if they do not fit."""

    def infer(self, index: int) -> None:
        """Run the loaded sample of this index and wait for it."""

    def stream(self, indices: Sequence[int]) -> Sequence[float]:
        """Run these samples with as many requests in flight as suits the device; latency of each in ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A model with what it runs on.

    `model` is an OpenVINO model, an already compiled one, a path (IR, ONNX, blob), or a ready `Runner`.
    `samples` replaces the run's common samples where this contestant takes other inputs (an embedded
    preprocessing, say). An onnxruntime contestant understands the property `INFERENCE_NUM_THREADS`.
    """

    name: str
    model: ov.Model | ov.CompiledModel | Path | Runner
    device: str = "CPU"
    properties: Mapping[str, str] = field(default_factory=dict)
    engine: Engine = Engine.OPENVINO
    samples: Sequence[Sample] | None = None
    is_hinted: bool = True
    """False: no `PERFORMANCE_HINT` but one of its own properties, whatever the mode."""
    requests: int | None = None
    """In flight in throughput mode; None: as many as the device calls optimal."""
    batch: int = 1
    """Samples of one request, by which throughput mode divides its times."""

    def hinted(self, mode: MeasureMode) -> dict[str, str]:
        """The properties to compile with, the mode's hint among them unless they name their own or want none."""
        hint = {"PERFORMANCE_HINT": mode.name} if self.is_hinted and self.engine is Engine.OPENVINO else {}
        return {**hint, **self.properties}


def open_runner(contestant: Contestant, *, mode: MeasureMode = MeasureMode.LATENCY) -> Runner:
    """The contestant compiled and ready, with the hint that `mode` asks for unless it names its own.

    Raises `ModelError` for a file that cannot be read, `DeviceError` where it cannot be compiled.
    """
    model = contestant.model
    if contestant.engine is Engine.ONNXRUNTIME:
        return _OnnxRuntimeRunner(contestant, mode)
    if isinstance(model, ov.CompiledModel):
        return _OpenVinoRunner(contestant, model, mode, compile_ms=None, size_bytes=None)
    if isinstance(model, ov.Model | Path):
        return _compiled(contestant, model, mode)
    return model


class _OpenVinoRunner:
    def __init__(
        self,
        contestant: Contestant,
        compiled: ov.CompiledModel,
        mode: MeasureMode,
        *,
        compile_ms: float | None,
        size_bytes: int | None,
    ) -> None:
        self.device, self.compile_ms, self.size_bytes = contestant.device, compile_ms, size_bytes
        self._name = contestant.name
        self._ports = [_Port.of(port) for port in compiled.inputs]
        self.warnings = _other_precision(contestant, compiled)
        self._request = compiled.create_infer_request()
        self._has_state = bool(self._request.query_state())
        self.in_flight = 1
        if mode is MeasureMode.THROUGHPUT:
            optimal = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
            self.in_flight = contestant.requests or max(optimal, 1)
        self._ring = [self._request, *(compiled.create_infer_request() for _ in range(self.in_flight - 1))]
        self._tensors: list[dict[int, ov.Tensor]] = []

    def load(self, samples: Sequence[Sample]) -> None:
        self._tensors = [
            {i: ov.Tensor(array, shared_memory=True) for i, array in enumerate(arrays)}
            for arrays in (_arrays(self._ports, sample, self._name) for sample in samples)
        ]

    def infer(self, index: int) -> None:
        try:
            if self._has_state:  # a sample must not go on where the one before it ended
                self._request.reset_state()
            for port, tensor in self._tensors[index].items():
                self._request.set_input_tensor(port, tensor)
            self._request.infer(share_outputs=True)
        except RuntimeError as exc:
            raise self._failure(exc) from exc

    def stream(self, indices: Sequence[int]) -> Sequence[float]:
        """The samples through a ring of requests, taken in turn.

        OpenVINO's own queue calls back into Python from its threads, which costs time and can hang when the
        queue is taken down.
        """
        latencies: list[float] = []
        ring = self._ring
        try:
            for turn, index in enumerate(indices):
                request = ring[turn % len(ring)]
                if turn >= len(ring):
                    request.wait()
                    latencies.append(request.latency)
                if self._has_state:
                    request.reset_state()
                request.start_async(self._tensors[index], share_inputs=True)
            for request in ring[: len(indices)]:
                request.wait()
                latencies.append(request.latency)
        except RuntimeError as exc:
            self._end_all()
            raise self._failure(exc) from exc
        except KeyboardInterrupt:
            self._end_all()
            raise
        return tuple(latencies)

    def _end_all(self) -> None:
        """Wait for every request: none may go on reading samples that are given back."""
        for request in self._ring:
            with contextlib.suppress(RuntimeError):
                request.wait()

    def _failure(self, exc: RuntimeError) -> DeviceError:
        return DeviceError(_NO_RUN.format(name=self._name, device=self.device, reason=reason_of(exc)))


class _OnnxRuntimeRunner:
    def __init__(self, contestant: Contestant, mode: MeasureMode) -> None:
        if find_spec("onnxruntime") is None:
            raise InputError(
                f'{contestant.name}: onnxruntime is not installed; pip install "vinoopt[parity]"'
            )
        if not isinstance(contestant.model, Path):
            raise InputError(f"{contestant.name}: onnxruntime needs the path of an ONNX file")
        unknown = sorted(set(contestant.properties) - {"INFERENCE_NUM_THREADS"})
        if unknown:
            raise InputError(f"{contestant.name}: onnxruntime does not know {', '.join(unknown)}")
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        self._errors: tuple[type[Exception], ...] = (
            native.Fail,
            native.InvalidArgument,
            native.InvalidGraph,
            native.InvalidProtobuf,
            native.NoSuchFile,
            native.NotImplemented,
            native.RuntimeException,
        )
        threads = int(contestant.properties.get("INFERENCE_NUM_THREADS", 0))
        cores = psutil.cpu_count(logical=False) or 1
        is_stream = mode is MeasureMode.THROUGHPUT and contestant.requests != 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1 if is_stream else threads
        self.in_flight = (contestant.requests or threads or cores) if mode is MeasureMode.THROUGHPUT else 1
        self.warnings: tuple[str, ...] = ()
        self._pool = ThreadPoolExecutor(self.in_flight)
        self._name, self.device = contestant.name, "CPU"
        self.size_bytes: int | None = contestant.model.stat().st_size if contestant.model.is_file() else None
        start = time.perf_counter_ns()
        try:
            self._session = ort.InferenceSession(str(contestant.model), options, ["CPUExecutionProvider"])
        except self._errors as exc:
            raise ModelError(f"{contestant.name}: onnxruntime refuses {contestant.model}: {exc}") from exc
        self.compile_ms: float | None = (time.perf_counter_ns() - start) / 1e6
        self._ports = [_Port.of_onnx(each) for each in self._session.get_inputs()]
        self._feeds: list[dict[str, NDArray[Any]]] = []

    def load(self, samples: Sequence[Sample]) -> None:
        names = [port.names[0] for port in self._ports]
        self._feeds = [
            dict(zip(names, _arrays(self._ports, sample, self._name), strict=True)) for sample in samples
        ]

    def infer(self, index: int) -> None:
        try:
            self._session.run(None, self._feeds[index])
        except self._errors as exc:
            raise DeviceError(_NO_RUN.format(name=self._name, device="onnxruntime", reason=exc)) from exc

    def stream(self, indices: Sequence[int]) -> Sequence[float]:
        def timed(index: int) -> float:
            start = time.perf_counter_ns()
            self.infer(index)
            return (time.perf_counter_ns() - start) / 1e6

        return tuple(self._pool.map(timed, indices))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Port:
    """What an input of a compiled model takes."""

    names: tuple[str, ...]
    shape: ov.PartialShape
    dtype: np.dtype[Any] | None

    @classmethod
    def of(cls, port: ov.ConstOutput) -> _Port:
        names = tuple(sorted(port.names)) or (port.node.get_friendly_name(),)
        return cls(names=names, shape=port.partial_shape, dtype=np.dtype(port.element_type.to_dtype()))

    @classmethod
    def of_onnx(cls, argument: Any) -> _Port:
        shape = ov.PartialShape([size if isinstance(size, int) else -1 for size in argument.shape])
        return cls(names=(argument.name,), shape=shape, dtype=_ONNX_DTYPES.get(argument.type))


_ONNX_DTYPES: dict[str, np.dtype[Any]] = {
    f"tensor({word})": np.dtype(numpy_word)
    for word, numpy_word in (
        ("float", "float32"),
        ("float16", "float16"),
        ("double", "float64"),
        ("uint8", "uint8"),
        ("int8", "int8"),
        ("int32", "int32"),
        ("int64", "int64"),
        ("bool", "bool"),
    )
}


def _compiled(contestant: Contestant, model: ov.Model | Path, mode: MeasureMode) -> Runner:
    core = ov.Core()
    properties = contestant.hinted(mode)
    where = f"{contestant.name} ({contestant.device})"
    start = time.perf_counter_ns()
    if isinstance(model, Path) and not model.is_file():
        raise ModelError(f"{contestant.name}: {model}: no such file")
    if isinstance(model, Path) and model.suffix == ".blob":
        size: int | None = model.stat().st_size
        compiled = _translated(
            lambda: core.import_model(
                io.BytesIO(model.read_bytes()), contestant.device, dict(contestant.properties)
            ),
            f"{where}: {model} cannot be imported; a blob fits only the device and release it was made for",
            DeviceError,
        )
    else:
        graph = (
            _translated(
                lambda: core.read_model(model), f"{contestant.name}: {model} cannot be read", ModelError
            )
            if isinstance(model, Path)
            else model
        )
        size = _constant_bytes(graph)
        compiled = _translated(
            lambda: core.compile_model(graph, contestant.device, properties),
            f"{where} cannot be compiled",
            DeviceError,
        )
    compile_ms = (time.perf_counter_ns() - start) / 1e6
    return _OpenVinoRunner(contestant, compiled, mode, compile_ms=compile_ms, size_bytes=size)


def _translated(call: Callable[[], Any], message: str, error: type[ModelError] | type[DeviceError]) -> Any:
    try:
        return call()
    except RuntimeError as exc:
        raise error(f"{message}: {reason_of(exc)}") from exc


def _other_precision(contestant: Contestant, compiled: ov.CompiledModel) -> tuple[str, ...]:
    """A sentence where the device computes in another format than it was asked for."""
    asked = contestant.properties.get(_PRECISION)
    if asked is None or _PRECISION not in compiled.get_property("SUPPORTED_PROPERTIES"):
        return ()
    used = str(compiled.get_property(_PRECISION).get_type_name())
    if used.lower() == asked.lower():
        return ()
    return (f"{contestant.name}: {asked} was asked for, but {contestant.device} computes in {used}",)


def _constant_bytes(model: ov.Model) -> int:
    """Bytes of all constants, each counted once: what the weights take on disk."""
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


def _arrays(ports: Iterable[_Port], sample: Sample, where: str) -> list[NDArray[Any]]:
    """The sample's arrays in the order of the ports; `DataError` where one is missing or does not fit."""
    found = []
    for port in ports:
        key = next((name for name in port.names if name in sample), None)
        if key is None:
            raise DataError(
                f'{where}: the samples lack input "{port.names[0]}" (they have {", ".join(sample)})'
            )
        array = np.require(sample[key], requirements=["C", "W"])  # OpenVINO shares no read-only memory
        if port.dtype is not None and array.dtype != port.dtype:
            raise DataError(f'{where}: input "{key}" takes {port.dtype}, the samples are {array.dtype}')
        if not port.shape.compatible(ov.PartialShape(list(array.shape))):
            raise DataError(f'{where}: input "{key}" takes {port.shape}, the samples are {list(array.shape)}')
        found.append(array)
    return found
