"""The child that runs models under a capped instruction set, which oneDNN reads once per process.

Started by `cpu_isa.py`, which sets the cap. It returns what it saw, without any statistics: kernels, raw
latencies of interleaved rounds, or outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from vinoopt.errors import DeviceError, ToolchainRefused
from vinoopt.records import Device
from vinoopt.toolchains.calls import read_calls, write_calls
from vinoopt.toolchains.host import describe_layers, layer_times, reason_of
from vinoopt.toolchains.process import serve

_LEAST_ROUNDS = 5
_MOST_PER_ROUND = 2000

Feed = dict[str, NDArray[Any]] | dict[int, NDArray[Any]]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request of `cpu_isa.py`: `compile_error` alone where OpenVINO cannot compile a model.

    That may be the cap's fault, which only the parent can find out; raises `ToolchainRefused` for inputs that
    do not fit.
    """
    try:
        return _OPERATIONS[request["op"]](request)
    except _CompileError as exc:
        return {"compile_error": str(exc)}


class _CompileError(Exception):
    """OpenVINO cannot compile a model."""


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    path = request["models"][0]
    layers = _layers(_compiled(path, request["properties"]))
    quantizers = [op for op in ov.Core().read_model(path).get_ops() if op.get_type_name() == "FakeQuantize"]
    return {"layers": [layers], "is_quantized": bool(quantizers)}


def _latency(request: dict[str, Any]) -> dict[str, Any]:
    given = zip(request["models"], request["per_model"], strict=True)
    models = [_compiled(path, properties) for path, properties in given]
    racers = [_Racer.of(model, request) for model in models]
    samples: list[list[list[float]]] = [[] for _ in models]
    end = None if request["seconds"] is None else time.perf_counter() + request["seconds"]
    for number in range(request["rounds"]):
        # Every round starts with another model, so that no one always follows the same neighbour.
        for place in range(len(models)):
            index = (number + place) % len(models)
            samples[index].append(racers[index].timed(racers[index].inferences))
        if end is not None and number + 1 >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
    return {"layers": [_layers(model) for model in models], "samples_ms": samples}


@dataclass(kw_only=True, slots=True)
class _Racer:
    """A model that is warm, with its inputs bound to tensors, so that no time goes into preparing them."""

    request: ov.InferRequest
    feeds: list[dict[int, ov.Tensor]]
    inferences: int = 1
    """Per round."""
    _next: int = 0

    @classmethod
    def of(cls, model: ov.CompiledModel, request: dict[str, Any]) -> _Racer:
        feeds = [_tensors(model, feed) for feed in _feeds(model, request["calls"])]
        racer = cls(request=model.create_infer_request(), feeds=feeds)
        typical = sorted(racer.timed(request["warmup"]))[request["warmup"] // 2]
        racer.inferences = min(max(math.ceil(request["round_ms"] / max(typical, 1e-3)), 1), _MOST_PER_ROUND)
        return racer

    def timed(self, count: int) -> list[float]:
        """Milliseconds of `count` inferences over the feeds in turn."""
        times = []
        for _ in range(count):
            feed = self.feeds[self._next % len(self.feeds)]
            self._next += 1
            started = time.perf_counter()
            for port, tensor in feed.items():
                self.request.set_input_tensor(port, tensor)
            try:
                self.request.infer(share_outputs=True)
            except RuntimeError as exc:
                raise ToolchainRefused(f"OpenVINO cannot run the model: {reason_of(exc)}") from exc
            times.append((time.perf_counter() - started) * 1e3)
        return times


def _predict(request: dict[str, Any]) -> dict[str, Any]:
    compiled = _compiled(request["models"][0], request["properties"])
    inference = compiled.create_infer_request()
    names = request["names"] or [_output_name(port, number) for number, port in enumerate(compiled.outputs)]

    def outputs() -> Iterator[dict[str, NDArray[Any]]]:
        for call in read_calls(Path(request["calls"])):
            inference.reset_state()
            found = _inferred(inference, call)
            yield {name: found[port] for name, port in zip(names, compiled.outputs, strict=True)}

    count = write_calls(Path(request["outputs"]), outputs())
    return {"layers": [_layers(compiled)], "count": count}


def _block_times(request: dict[str, Any]) -> dict[str, Any]:
    try:
        model = ov.Core().read_model(request["models"][0])
        calls = read_calls(Path(request["calls"]))
        times = layer_times(model, Device.CPU, request["properties"], calls, blocks=request["blocks"])
    except (RuntimeError, DeviceError) as exc:
        raise _CompileError(f"OpenVINO cannot time {Path(request['models'][0]).name}: {exc}") from exc
    layers = _layers(_compiled(request["models"][0], request["properties"]))
    return {"layers": [layers], "times_us": times}


_OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "compile": _compile,
    "latency": _latency,
    "predict": _predict,
    "block_times": _block_times,
}


def _compiled(path: str, properties: dict[str, str]) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(path, "CPU", properties)
    except RuntimeError as exc:
        raise _CompileError(f"OpenVINO cannot compile {Path(path).name}: {reason_of(exc)}") from exc


def _inferred(inference: ov.InferRequest, feed: Feed) -> Any:
    try:
        return inference.infer(feed, share_inputs=True)
    except RuntimeError as exc:
        raise ToolchainRefused(f"OpenVINO cannot run the model: {reason_of(exc)}") from exc


def _tensors(model: ov.CompiledModel, feed: Feed) -> dict[int, ov.Tensor]:
    """The feed as tensors by input number; raises `ToolchainRefused` where an input is missing or does not fit."""
    found: dict[int, ov.Tensor] = {}
    values: dict[Any, NDArray[Any]] = dict(feed)
    for number, port in enumerate(model.inputs):
        key = next((name for name in (number, *port.names) if name in values), None)
        if key is None:
            raise ToolchainRefused(f"no sample has the input {port.any_name if port.names else number}")
        shape = port.get_partial_shape()
        if not shape.compatible(ov.PartialShape(list(values[key].shape))):
            raise ToolchainRefused(f"input {key} takes {shape}, and a sample has {list(values[key].shape)}")
        dtype = port.get_element_type().to_dtype()
        found[number] = ov.Tensor(np.ascontiguousarray(values[key], dtype), shared_memory=True)
    return found


def _feeds(model: ov.CompiledModel, calls: str | None) -> Sequence[Feed]:
    """The calls of the file, else one call of seeded noise; raises `ToolchainRefused` for a dynamic input."""
    if calls is not None:
        return list(read_calls(Path(calls)))
    generator = np.random.default_rng(0)
    feed: dict[int, NDArray[Any]] = {}
    for number, port in enumerate(model.inputs):
        if port.get_partial_shape().is_dynamic:
            raise ToolchainRefused(
                f"input {port.any_name if port.names else number} has no fixed shape: latency needs samples"
            )
        dtype = port.get_element_type().to_dtype()
        noise = generator.random(tuple(port.shape))
        # Whole numbers stay 0: as indices they must lie inside a table of unknown length.
        feed[number] = (noise if np.issubdtype(dtype, np.floating) else np.zeros_like(noise)).astype(dtype)
    return [feed]


def _output_name(port: ov.ConstOutput, number: int) -> str:
    return str(port.any_name) if port.names else f"output_{number}"


def _layers(compiled: ov.CompiledModel) -> list[dict[str, Any]]:
    return [layer.model_dump(mode="json") for layer in describe_layers(compiled)]


if __name__ == "__main__":  # a process started by multiprocessing imports this module again
    serve(answer)
