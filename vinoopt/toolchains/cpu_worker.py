"""The child that runs models under a capped instruction set, which oneDNN reads once per process.

Started by `cpu_isa.py`, which sets the cap. It returns what it saw, without any statistics: kernels, raw
latencies of interleaved rounds, or outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
    started = time.perf_counter()
    compiled = _compiled(request["models"][0], request)
    return {"layers": [_layers(compiled)], "seconds": time.perf_counter() - started}


def _latency(request: dict[str, Any]) -> dict[str, Any]:
    models = [_compiled(path, request) for path in request["models"]]
    feeds = [_feeds(model, request["calls"]) for model in models]
    requests = [model.create_infer_request() for model in models]
    for inference, feed in zip(requests, feeds, strict=True):
        _timed(inference, feed, request["warmup"])
    samples: list[list[list[float]]] = [[] for _ in models]
    for number in range(request["rounds"]):
        # Every round starts with another model, so that no one always follows the same neighbour.
        for place in range(len(models)):
            index = (number + place) % len(models)
            samples[index].append(_timed(requests[index], feeds[index], request["inferences"]))
    return {"layers": [_layers(model) for model in models], "samples_ms": samples}


def _predict(request: dict[str, Any]) -> dict[str, Any]:
    compiled = _compiled(request["models"][0], request)
    inference = compiled.create_infer_request()
    names = [_output_name(port, number) for number, port in enumerate(compiled.outputs)]

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
    layers = _layers(_compiled(request["models"][0], request))
    return {"layers": [layers], "times_us": times}


_OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "compile": _compile,
    "latency": _latency,
    "predict": _predict,
    "block_times": _block_times,
}


def _compiled(path: str, request: dict[str, Any]) -> ov.CompiledModel:
    try:
        return ov.Core().compile_model(path, "CPU", request["properties"])
    except RuntimeError as exc:
        raise _CompileError(f"OpenVINO cannot compile {Path(path).name}: {reason_of(exc)}") from exc


def _inferred(inference: ov.InferRequest, feed: Feed) -> Any:
    try:
        return inference.infer(feed, share_inputs=True)
    except RuntimeError as exc:
        raise ToolchainRefused(f"OpenVINO cannot run the model: {reason_of(exc)}") from exc


def _timed(inference: ov.InferRequest, feeds: Sequence[Feed], count: int) -> list[float]:
    """Milliseconds of `count` inferences over the feeds in turn."""
    times = []
    for number in range(count):
        feed = feeds[number % len(feeds)]
        started = time.perf_counter()
        _inferred(inference, feed)
        times.append((time.perf_counter() - started) * 1e3)
    return times


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
